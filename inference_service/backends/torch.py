"""Plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, silu

from inference_service.backends.base import Attention, Turn
from inference_service.kernels.attention import Context, PagedAttention
from inference_service.kernels.rows import Activation
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import Rope, rotate
from inference_service.lora.segments import Arrangement, Segment
from inference_service.lora.weights import AdapterWeights, GroupWeights
from loramux_shared.bases.attention import AttentionSpec
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bundle.modules import BaseDims

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


class TorchOperations:
    """In plain torch, on any device."""

    def __init__(
        self,
        dims: BaseDims,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        """Take the sizes of the model, and the windows of its layers."""
        self._num_heads, self._kv_heads, self._head_dim = dims.num_heads, dims.num_kv_heads, dims.head_dim
        self._dtype = dtype
        self._device = device
        self._windows = windows

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """All rows at once."""
        return layer(x)

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """All positions at once."""
        return rope.at(positions)

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """In one or two operations."""
        hidden = embedding(tokens, table)
        return hidden if scale == 1.0 else hidden * scale

    def norm(self, hidden: Tensor, norm: RMSNorm, delta: Tensor | None, delta_norm: RMSNorm | None) -> Tensor:
        """One after the other."""
        if delta is not None:
            hidden += delta if delta_norm is None else delta_norm(delta)
        return norm(hidden)

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Two operations."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Three operations."""
        return torch.tanh(logits / cap) * cap

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Gather the contexts, once for all layers of a window."""
        groups = self._num_heads // self._kv_heads
        plan = PagedAttention(contexts, block_size, groups, self._dtype, self._device, self._windows)
        return TorchAttention(plan, self._num_heads, self._kv_heads)

    def new_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """[kv heads, rows, d] each."""
        shape = self._kv_heads, num_rows, self._head_dim
        keys, values = (torch.zeros(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        return keys, values


class TorchAttention:
    """In plain torch."""

    def __init__(self, plan: PagedAttention, num_heads: int, num_kv_heads: int) -> None:
        self._plan = plan
        self._num_heads = num_heads
        self._rotated = num_heads + num_kv_heads

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """As they are."""
        return cos, sin

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
    ) -> Tensor:
        """Rotate queries and keys together, then gather and attend."""
        heads = _normed(heads, self._rotated, norm)
        qk = rotate(heads[:, : self._rotated], *turn)
        q, k = qk[:, : self._num_heads], qk[:, self._num_heads :]
        out = self._plan(q, k, heads[:, self._rotated :], keys, values, spec)
        return out.reshape(len(heads), -1)


def _normed(heads: Tensor, rotated: int, norm: RMSNorm | None) -> Tensor:
    """Norm the heads of queries and keys [T, all heads, d], not those of values."""
    return heads if norm is None else torch.cat([norm(heads[:, :rotated]), heads[:, rotated:]], dim=1)


@dataclass(frozen=True)
class _Pack:
    """The adapters of one set of slots in one fused linear, slice by slice, then slot by slot."""

    a: Tensor
    """[R, in]"""
    b: tuple[Tensor | None, ...]
    """Per slice [R_s, out_s]."""
    ranks: tuple[tuple[int, ...], ...]
    """Per slice, per slot. Equal ranks share a mask."""


class TorchLora:
    """Adds the adapters' part to the output of a fused linear.

    One product with the packed A of the active adapters, a mask, and one product per slice. Rows of adapters
    that come in long runs, as in prefill, take two products of their own: a shared one would multiply each row
    with every adapter's A.
    """

    name = "torch"

    def __init__(self, groups: tuple[GroupShape, ...], device: torch.device) -> None:
        self.home = device
        self._adapters: list[AdapterWeights] = []
        self._groups = {group.name: group for group in groups}
        self._slots: tuple[int, ...] = ()
        self._packs: dict[tuple[int, str], _Pack | None] = {}
        self._short: tuple[Segment, ...] = ()
        self._long: tuple[Segment, ...] = ()
        self._masks: dict[tuple[tuple[int, ...], ...], Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """The matrices as they were loaded."""
        return sum(weights.num_bytes for weights in self._adapters)

    def load(self, weights: AdapterWeights) -> int:
        """Take an adapter in as it is."""
        self._adapters.append(weights)
        return len(self._adapters) - 1

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step."""
        self._short, self._long = arrangement.short, arrangement.long
        self._masks.clear()
        slots = tuple(segment.slot for segment in self._short)
        if slots != self._slots:
            self._slots = slots
            self._packs.clear()

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        shape = self._groups[group]
        if self._short:
            self._apply_short(x, out, layer, shape)
        for segment in self._long:
            weights = self._adapters[segment.slot].layers[layer].get(group)
            if weights is not None:
                rows = slice(segment.start, segment.end)
                _add(x[rows], out[rows], weights.a, weights.b, weights.ranks, None, shape)

    def _apply_short(self, x: Tensor, out: Tensor, layer: int, shape: GroupShape) -> None:
        key = layer, shape.name
        if key not in self._packs:
            self._packs[key] = self._pack(layer, shape)
        pack = self._packs[key]
        if pack is None:
            return
        rows = slice(self._short[0].start, self._short[-1].end)
        mask = self._mask(pack.ranks, x) if len(self._short) > 1 else None
        widths = tuple(sum(ranks) for ranks in pack.ranks)
        _add(x[rows], out[rows], pack.a, pack.b, widths, mask, shape)

    def _pack(self, layer: int, shape: GroupShape) -> _Pack | None:
        found = [self._adapters[slot].layers[layer].get(shape.name) for slot in self._slots]
        a: list[Tensor] = []
        b: list[Tensor | None] = []
        ranks = []
        for index in range(len(shape.modules)):
            parts = [None if weights is None else _slice_of(weights, index) for weights in found]
            ranks.append(tuple(0 if part is None else part[0].shape[0] for part in parts))
            present = [part for part in parts if part is not None]
            a += [part[0] for part in present]
            b.append(torch.cat([part[1] for part in present]) if present else None)
        return _Pack(torch.cat(a), tuple(b), tuple(ranks)) if a else None

    def _mask(self, ranks: tuple[tuple[int, ...], ...], x: Tensor) -> Tensor:
        """[rows, R]: 1 where row and rank belong to the same adapter."""
        if ranks not in self._masks:
            owner = torch.tensor(
                [slot for part in ranks for slot, rank in enumerate(part) for _ in range(rank)]
            )
            rows = torch.tensor([index for index, seg in enumerate(self._short) for _ in range(seg.length)])
            self._masks[ranks] = (rows[:, None] == owner[None, :]).to(x)
        return self._masks[ranks]


def _slice_of(weights: GroupWeights, index: int) -> tuple[Tensor, Tensor] | None:
    """Return A [rank, in] and B [rank, out] of one slice."""
    b = weights.b[index]
    if b is None:
        return None
    first = sum(weights.ranks[:index])
    return weights.a[first : first + b.shape[0]], b


def _add(
    x: Tensor,
    out: Tensor,
    a: Tensor,
    b: tuple[Tensor | None, ...],
    widths: tuple[int, ...],
    mask: Tensor | None,
    shape: GroupShape,
) -> None:
    y = torch.mm(x, a.t())
    if mask is not None:
        y.mul_(mask)
    first = 0
    for part, width, offset, size in zip(b, widths, shape.out_offsets, shape.out_features, strict=True):
        if part is not None:
            out[:, offset : offset + size].addmm_(y[:, first : first + width], part)
            first += width
