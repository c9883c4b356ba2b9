"""The processes that compute a decoder together with the engine's: the ranks of tensor parallelism."""
