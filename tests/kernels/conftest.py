"""Where kernels are tested."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels are tested: the GPU, or the interpreter's CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
