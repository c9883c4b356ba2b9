"""The inference service's gRPC API."""
