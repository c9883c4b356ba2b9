"""Manifests that the builder wrote; ``make golden`` writes them again, and the diff is read."""
