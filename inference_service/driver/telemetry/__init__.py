"""A replica's telemetry for its operators: metrics, one log line per request, traces."""
