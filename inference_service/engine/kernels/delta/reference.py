"""The gated delta rule in plain torch, row by row and in tiles of rows: also what runs without kernels.

A state S [key dim, value dim] of a head is decayed, corrected by what a row's value differs from what its key
finds, and read with the row's query:

    S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q

Sources: Gated Delta Networks https://arxiv.org/abs/2412.06464; for many rows at a time the WY representation as
in https://arxiv.org/abs/2406.06484.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu, softplus

from inference_service.engine.kernels.delta.inputs import L2_EPS, DeltaInputs, StateChunk

TILE = 64
"""Rows that are computed together."""


class Heads(NamedTuple):
    """Rows of one or several sequences for the delta rule, in the type of the states: [N, heads, L, ...]."""

    q: Tensor
    """[..., key dim], with the scale of the products."""
    k: Tensor
    """[..., key dim], of length 1."""
    v: Tensor
    """[..., value dim]"""
    g: Tensor
    """Logarithm of what is left of the state at each row."""
    beta: Tensor


def gated_delta(inputs: DeltaInputs, chunks: Sequence[StateChunk]) -> Tensor:
    """Return [T, value heads * value dim] of the rows, and take the states of their sequences behind them.

    Rows that belong to no chunk are 0.
    """
    out = torch.zeros_like(inputs.z, memory_format=torch.contiguous_format)
    single = [chunk for chunk in chunks if chunk.length == 1]
    groups = [single] if single else []
    groups += [[chunk] for chunk in chunks if chunk.length > 1]
    for group in groups:  # all single rows together, every longer chunk alone
        index = torch.tensor(
            [[*range(chunk.row, chunk.row + chunk.length)] for chunk in group], device=out.device
        )
        out[index] = _advance(inputs, group, index)
    return out


def _advance(inputs: DeltaInputs, chunks: list[StateChunk], index: Tensor) -> Tensor:
    """Return the output [N, L, ...] of chunks of the same length, by their rows [N, L]."""
    states, device = inputs.states, index.device
    slots = torch.tensor([chunk.slot for chunk in chunks], device=device)
    going = torch.tensor([not chunk.fresh for chunk in chunks], device=device)
    before = torch.where(going[:, None, None], states.conv[slots], 0)  # a slot that is fresh may hold NaN
    state = torch.where(going[:, None, None, None], states.recurrent[slots], 0)
    rows = torch.cat([before, inputs.qkv[index]], dim=1)
    states.conv[slots] = rows[:, rows.shape[1] - before.shape[1] :]
    heads = heads_of(inputs, convolved(rows, inputs.weights.conv), index)
    out, states.recurrent[slots] = (recurrent if index.shape[1] == 1 else chunked)(heads, state)
    return _gated(inputs, out.transpose(1, 2).to(inputs.qkv.dtype), index)


def convolved(rows: Tensor, weight: Tensor) -> Tensor:
    """Return silu of the convolution [N, L, channels] of rows [N, width - 1 + L, channels]."""
    taps = weight.t().unsqueeze(1)
    return silu(conv1d(rows.transpose(1, 2), taps, groups=len(taps))).transpose(1, 2)


def heads_of(inputs: DeltaInputs, rows: Tensor, index: Tensor) -> Heads:
    """Part what was convolved [N, L, channels] into heads; index [N, L] says which rows of the step it is."""
    kind = inputs.states.recurrent.dtype
    keys = inputs.key_heads * inputs.key_dim
    parts = torch.split(rows.to(kind), [keys, keys, rows.shape[2] - 2 * keys], dim=2)
    q, k, v = (
        part.reshape(*part.shape[:2], -1, dim).transpose(1, 2)
        for part, dim in zip(parts, (inputs.key_dim, inputs.key_dim, inputs.value_dim), strict=True)
    )
    shared = inputs.value_heads // inputs.key_heads
    q, k = (_unit(each).repeat_interleave(shared, dim=1) for each in (q, k))
    weights = inputs.weights
    g = weights.decay.to(kind) * softplus(inputs.a[index].to(kind) + weights.dt_bias.to(kind))
    beta = inputs.b[index].sigmoid().to(kind)
    return Heads(q * inputs.key_dim**-0.5, k, v, g.transpose(1, 2), beta.transpose(1, 2))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def recurrent(heads: Heads, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output [N, heads, L, value dim] and the state behind the last row, row by row."""
    out = torch.empty_like(heads.v)
    for at in range(heads.v.shape[2]):
        q, k, v, g, beta = (part[:, :, at] for part in heads)
        state = state * g.exp()[..., None, None]
        found = (state * k[..., None]).sum(-2)
        state = state + k[..., None] * ((v - found) * beta[..., None])[..., None, :]
        out[:, :, at] = (state * q[..., None]).sum(-2)
    return out, state


def chunked(heads: Heads, state: Tensor, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Return what `recurrent` does, with products of so many rows at a time."""
    outs = []
    for parts in zip(*(torch.split(part, tile, dim=2) for part in heads), strict=True):
        q, k, v, g, beta = parts
        total = g.cumsum(-1)
        # The share of a write at row j that is left at row i; 0 above the diagonal.
        left = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        system = (k * beta[..., None]) @ k.mT * left
        both = torch.cat([v * beta[..., None], k * (beta * total.exp())[..., None]], dim=-1)
        solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
        corrections, reads = torch.split(solved, [v.shape[-1], k.shape[-1]], dim=-1)
        written = corrections - reads @ state
        outs.append((q * total.exp()[..., None]) @ state + (q @ k.mT * left) @ written)
        kept = k * (total[..., -1:] - total).exp()[..., None]
        state = state * total[..., -1:, None].exp() + kept.mT @ written
    return torch.cat(outs, dim=2), state


def _gated(inputs: DeltaInputs, out: Tensor, index: Tensor) -> Tensor:
    """Norm the output [N, L, heads, value dim] head by head, and gate it: [N, L, heads * value dim]."""
    kind = inputs.states.recurrent.dtype
    wide = out.to(kind)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + inputs.weights.eps)
    normed = normed.to(out.dtype) * inputs.weights.norm
    gate = silu(inputs.z[index].to(kind)).view(wide.shape)
    return (normed * gate).to(out.dtype).flatten(2)
