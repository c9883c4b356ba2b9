"""Without a GPU, kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: the GPU, or the interpreter's CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
