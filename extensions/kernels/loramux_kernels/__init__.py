"""Kernels for a GPU, compiled for an image on a machine without one."""
