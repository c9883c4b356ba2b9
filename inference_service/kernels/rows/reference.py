"""The reference of the kernels, in plain torch, in any dtype and without roundings in between."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def norm(x: Tensor, weight: Tensor, *, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) * (offset + weight) over the last axis, computed and returned in ``dtype``."""
    wide = x.to(dtype)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.to(dtype) + offset)


def activated(x: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """activation(x)."""
    wide = x.to(dtype)
    return (
        silu(wide)
        if activation == "silu"
        else gelu(wide, approximate="tanh" if "tanh" in activation else "none")
    )


def gated(gate_up: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """activation(gate) * up [T, I] of both side by side."""
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    return activated(gate, activation, dtype) * up


def embed(tokens: Tensor, table: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Rows [T, dim] of the table, times the scale as the table's dtype has it."""
    return table[tokens.long()].to(dtype) * torch.tensor(scale, dtype=table.dtype).to(dtype)


def softcap(logits: Tensor, cap: float, dtype: torch.dtype) -> Tensor:
    """tanh(logits / cap) * cap."""
    return torch.tanh(logits.to(dtype) / cap) * cap
