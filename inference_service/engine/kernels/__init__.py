"""Kernels: each with a reference, a Triton kernel, a launcher and a tuning table."""
