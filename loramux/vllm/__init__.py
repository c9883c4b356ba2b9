"""Messages of vLLM's gRPC services, generated from ``protos/loramux/vllm``."""
