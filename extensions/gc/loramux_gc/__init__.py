"""Garbage collection of a store: what nothing refers to, listed or removed."""
