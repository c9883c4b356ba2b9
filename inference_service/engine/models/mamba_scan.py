"""Mamba-2 over states in slots, in plain torch: row by row, and in tiles of rows.

A row's step is s = softplus(dt + bias), within bounds; x, B and C come out of a convolution. A state S
[head dim, state dim] of a head decays, takes in the row, and is read:

    S <- exp(-exp(A_log) s) S + s x B^T;  y = S C + D x

The output is gated and normed group by group. All is computed in float32, whatever type rows have.

Source: Transformers are SSMs, https://arxiv.org/abs/2405.21060; the tiles are its section 6.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from inference_service.engine.kernels.delta import DeltaStates, StateChunk
from loramux_shared.bases.mamba_layers import MambaLayer

TILE: Final = 64
"""Rows that are computed together."""


@dataclass(frozen=True)
class MambaWeights:
    """The weights of a mixer beside its linears, in float32."""

    conv: Tensor
    """[width, channels]: of the row itself comes last."""
    conv_bias: Tensor | None
    """[channels]"""
    decay: Tensor
    """[heads]: -exp(A_log)."""
    dt_bias: Tensor
    """[heads]"""
    skip: Tensor
    """[heads]: D."""
    norm: Tensor | None
    """[heads * head dim]"""
    eps: float
    """Epsilon of that norm."""


class Heads(NamedTuple):
    """Rows of sequences, by groups g of r heads each."""

    x: Tensor
    """[N, L, g, r, head dim], multiplied with the row's step."""
    b: Tensor
    """[N, L, g, state dim]"""
    c: Tensor
    """[N, L, g, state dim]"""
    left: Tensor
    """[N, L, g, r]: logarithm of what is left of the state at each row."""


def mamba(
    rows: Tensor,
    spec: MambaLayer,
    weights: MambaWeights,
    states: DeltaStates,
    chunks: Sequence[StateChunk],
    *,
    by_row: bool = False,
) -> Tensor:
    """Return [T, heads * head dim] of rows [T, all parts], and take the states of their sequences behind them.

    Rows that belong to no chunk are 0. By row, each row is computed alone, so that its bits depend on it and
    the state before it.
    """
    out = rows.new_zeros(len(rows), spec.features)
    for group in _groups(tuple(chunks), rows.device, by_row):
        for at, computed in _advance(rows[group.rows], spec, weights, states, group):
            out[group.rows[:, at : at + computed.shape[1]]] = computed.to(out.dtype)
    return out


class _Group(NamedTuple):
    """Chunks of the same length, on the device."""

    rows: Tensor
    """[N, L]"""
    slots: Tensor
    """[N]"""
    fresh: tuple[int, ...]
    """Places of those that begin a sequence."""


@lru_cache(maxsize=2)  # all layers of a step have the same
def _groups(chunks: tuple[StateChunk, ...], device: torch.device, by_row: bool) -> list[_Group]:
    """Return single rows together, and every longer chunk alone; by row, each row alone, in their order."""
    if by_row:
        parted = [[each] for chunk in chunks for each in _single(chunk)]
    else:
        single = [chunk for chunk in chunks if chunk.length == 1]
        parted = [single] if single else []
        parted += [[chunk] for chunk in chunks if chunk.length > 1]
    return [
        _Group(
            torch.tensor([[*range(each.row, each.row + each.length)] for each in group], device=device),
            torch.tensor([each.slot for each in group], device=device),
            tuple([place for place, each in enumerate(group) if each.fresh]),
        )
        for group in parted
    ]


def _single(chunk: StateChunk) -> Iterable[StateChunk]:
    for row in range(chunk.length):
        yield StateChunk(chunk.row + row, 1, chunk.slot, chunk.fresh and row == 0)


def _advance(
    rows: Tensor, spec: MambaLayer, weights: MambaWeights, states: DeltaStates, group: _Group
) -> Iterable[tuple[int, Tensor]]:
    """Yield the output [N, some, features] of chunks of the same length, and its place in rows [N, L]."""
    slots, width = group.slots, spec.conv_width
    before, state = states.conv[slots], states.recurrent[slots]
    for place in group.fresh:  # whose slots may hold NaN
        before[place] = state[place] = 0
    state = state.view(len(slots), spec.num_groups, -1, *state.shape[2:])
    gate, convolving, steps = torch.split(rows, [spec.features, spec.channels, spec.heads], dim=2)
    convolving = torch.cat([before, convolving], dim=1)
    states.conv[slots] = convolving[:, convolving.shape[1] - (width - 1) :]
    for at in range(0, rows.shape[1], TILE):
        end = min(at + TILE, rows.shape[1])
        x, b, c = _convolved(convolving[:, at : end + width - 1], spec, weights)
        step = softplus(steps[:, at:end].float() + weights.dt_bias).clamp(*spec.step_limits)
        left = step * weights.decay
        heads = Heads(x * step.view(*x.shape[:4], 1), b, c, left.view(x.shape[:4]))
        y, state = (recurrent if rows.shape[1] == 1 else tiled)(heads, state)
        y = y + x * weights.skip.view(*x.shape[2:4], 1)
        yield at, _gated(y.flatten(2), gate[:, at:end].float(), spec, weights)
    states.recurrent[slots] = state.flatten(1, 2)


def _convolved(rows: Tensor, spec: MambaLayer, weights: MambaWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and what writes and reads states, of rows [N, width - 1 + L, channels]."""
    wide, length = rows.float(), rows.shape[1] - spec.conv_width + 1
    out = wide[:, :length] * weights.conv[0]
    for tap in range(1, spec.conv_width):
        out += wide[:, tap : tap + length] * weights.conv[tap]
    if weights.conv_bias is not None:
        out += weights.conv_bias
    x, b, c = torch.split(silu(out), list(spec.parts[1:4]), dim=2)
    groups = len(rows), length, spec.num_groups
    return x.view(*groups, -1, spec.head_dim), b.view(*groups, -1), c.view(*groups, -1)


def recurrent(heads: Heads, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output as x, and the state [N, g, r, head dim, state dim], taken on in place, row by row."""
    outs = []
    for at in range(heads.x.shape[1]):
        x, b, c, left = (part[:, at] for part in heads)
        state *= left.exp()[..., None, None]
        state.addcmul_(x[..., None], b[:, :, None, None, :])
        outs.append((state @ c[:, :, None, :, None]).squeeze(-1))
    return torch.stack(outs, dim=1), state


def tiled(heads: Heads, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `recurrent` does, with products of all rows."""
    x = heads.x.permute(0, 2, 3, 1, 4)  # [N, g, r, L, head dim]
    b, c = (part.transpose(1, 2)[:, :, None] for part in (heads.b, heads.c))  # [N, g, 1, L, state dim]
    total = heads.left.permute(0, 2, 3, 1).cumsum(-1)
    # what is left at row i of what row j wrote; 0 above the diagonal
    left = (total[..., :, None] - total[..., None, :]).exp().tril()
    out = (c @ b.mT * left) @ x + (c @ state.mT) * total.exp()[..., None]
    kept = x * (total[..., -1:] - total).exp()[..., None]
    return out.permute(0, 3, 1, 2, 4), state * total[..., -1:, None].exp() + kept.mT @ b


def _gated(y: Tensor, gate: Tensor, spec: MambaLayer, weights: MambaWeights) -> Tensor:
    """Gate y [N, L, heads * head dim], and norm it group by group."""
    if weights.norm is None:
        return y * silu(gate)
    if spec.gating == "then norm":
        y = y * silu(gate)
    parts = y.view(*y.shape[:2], spec.num_groups, -1)
    normed = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + weights.eps)).flatten(2)
    normed = normed * weights.norm
    return normed * silu(gate) if spec.gating == "behind norm" else normed
