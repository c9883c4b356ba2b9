"""npy files of another TensorRT-LLM converter: how they are read, and the command that publishes them."""
