"""Generated stubs of the inference service."""
