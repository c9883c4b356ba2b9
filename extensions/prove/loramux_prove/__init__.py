"""A second reading of adapters, apart from the builder's on purpose, and the reference that proves with it."""
