"""vLLM's gRPC services: its own, and the one by which the gateway SMG speaks with it."""
