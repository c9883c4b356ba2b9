"""Generated stubs, version 1."""
