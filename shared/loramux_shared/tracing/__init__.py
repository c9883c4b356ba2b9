"""OpenTelemetry traces: servers know the port, the extra `otel` brings the implementation."""
