"""OpenTelemetry traces: doors know the port, the extra `otel` brings what is behind it."""
