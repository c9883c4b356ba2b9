"""Adapters in memory: slots, segments, loading."""
