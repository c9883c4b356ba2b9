"""Generated stubs of the builder service."""
