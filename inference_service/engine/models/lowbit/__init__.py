"""Weights of few bits: found among a checkpoint's tensors, checked, and widened."""
