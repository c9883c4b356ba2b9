"""Vectors, scores and classes of texts."""
