"""The builder's gRPC door."""
