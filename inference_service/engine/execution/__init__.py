"""A step on a device: from sequences to tokens."""
