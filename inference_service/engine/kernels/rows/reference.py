"""The reference of the kernels, in plain torch, in any dtype and without roundings in between."""

from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from inference_service.engine.kernels.rows.launch import Activation

ACTIVATIONS: Final[dict[Activation, Callable[[Tensor], Tensor]]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
}


def norm(x: Tensor, weight: Tensor, *, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * (offset + weight) over the last axis, computed and returned in ``dtype``."""
    wide = x.to(dtype)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.to(dtype) + offset)


def activated(x: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """activation(x)."""
    return ACTIVATIONS[activation](x.to(dtype))


def gated(gate_up: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """activation(gate) * up [T, I] of both side by side."""
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def embed(tokens: Tensor, table: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Rows [T, dim] of the table, times the scale as the table's dtype has it."""
    return table[tokens.long()].to(dtype) * torch.tensor(scale, dtype=table.dtype).to(dtype)


def softcap(logits: Tensor, cap: float, dtype: torch.dtype) -> Tensor:
    """tanh(logits / cap) * cap."""
    return torch.tanh(logits.to(dtype) / cap) * cap
