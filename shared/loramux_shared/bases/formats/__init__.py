"""Checkpoints with weights of 8 or 4 bits: what their ``quantization_config`` says, and which are read."""
