"""The builder's gRPC API."""
