"""The rules: what an adapter may be. No I/O."""
