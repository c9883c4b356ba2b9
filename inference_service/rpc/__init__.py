"""The inference service's gRPC door."""
