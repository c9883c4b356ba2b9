"""A second reading of an adapter, and the proof that what is served is what was trained."""
