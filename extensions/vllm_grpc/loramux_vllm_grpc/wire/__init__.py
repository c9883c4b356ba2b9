"""Messages of vLLM's gRPC services, generated from ``extensions/vllm_grpc/protos``."""
