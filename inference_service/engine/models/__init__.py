"""Decoders, built from checkpoints."""
