"""OpenTelemetry: spans of calls, and of the requests of a replica."""
