"""Rules about one adapter: functions from what was read to findings."""
