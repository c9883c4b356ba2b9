"""The place where the kernels of these tests run."""

from typing import Final

import triton

COMPILED: Final = not triton.knobs.runtime.interpret
"""Kernels are compiled, and take tensors of a GPU alone."""
DEVICE: Final = "cuda" if COMPILED else "cpu"
NO_GPU: Final = (
    "Torch not compiled with CUDA enabled",
    "Found no NVIDIA driver",
    "No CUDA GPUs are available",
    "LORAMUX_BACKEND=triton needs a CUDA device",
)
"""Beginnings of messages where a device is missing."""
