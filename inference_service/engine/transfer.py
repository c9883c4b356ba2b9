"""Copies between host and device that nobody waits for: by pinned memory, which is kept until they are done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Return numbers as int64 on the device."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory; it is complete when the device has done what it was given so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
