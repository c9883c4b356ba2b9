"""Families of decoders with Mamba-2 mixers."""
