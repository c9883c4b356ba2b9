"""The inference service: one base, many adapters, one batch."""
