"""What a replica tells its operators: metrics, one log line per request, traces."""
