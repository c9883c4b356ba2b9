"""API processes beside the engine's process, and the channel between them."""
