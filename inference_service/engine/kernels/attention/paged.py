"""Attention over a paged cache, in plain torch: gather the context, then two batched products.

The cache of a layer is [kv heads, cache rows, head_dim], so that a gathered context is ready for a batched
product, and the queries of a group (GQA) are folded into the query axis.

A cache of 8 bits has a scale for every token and head, which is the token's own: what a token leaves there
depends neither on the chunk that it came in nor on those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inference_service.core.sequence import NEVER, NOWHERE
from loramux_shared.bases.rope import AttentionSpec

MOST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The types of a cache of 8 bits, and the largest number of each."""
LEAST_SCALE: Final = 1e-30
LOW_BITS: Final = 0xFFFF
"""Bits of a float32 that bfloat16 does not have."""
At = TypeVar("At", int, Tensor)


@dataclass(frozen=True)
class KeysValues:
    """The cache of a layer."""

    keys: Tensor
    """[kv heads, cache rows, d]"""
    values: Tensor
    """Values, in the keys' layout."""
    scales: Tensor | None = None
    """bfloat16 [2, kv heads, cache rows] of keys and values of 8 bits."""

    @classmethod
    def allocate(
        cls, kv_heads: int, rows: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> KeysValues:
        """Return an empty cache."""
        keys, values = (torch.zeros(kv_heads, rows, dim, dtype=dtype, device=device) for _ in range(2))
        if dtype not in MOST:
            return cls(keys, values)
        return cls(keys, values, torch.zeros(2, kv_heads, rows, dtype=torch.bfloat16, device=device))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return those that there are."""
        return (self.keys, self.values) if self.scales is None else (self.keys, self.values, self.scales)

    def write(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v [T, kv heads, d] to rows [T]."""
        for index, (cache, part) in enumerate(((self.keys, k), (self.values, v))):
            if self.scales is None:
                cache.index_copy_(1, rows, part.transpose(0, 1))
                continue
            numbers, scales = narrowed(part.transpose(0, 1), cache.dtype)
            _bits(cache).index_copy_(1, rows, _bits(numbers))
            self.scales[index].index_copy_(1, rows, scales)

    def read(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values [kv heads, n, d] of rows [n]."""
        if self.scales is None:
            return self.keys.index_select(1, rows), self.values.index_select(1, rows)
        scales = self.scales.index_select(2, rows).float()[..., None]
        keys, values = (
            _bits(cache).index_select(1, rows).view(cache.dtype).float() for cache in (self.keys, self.values)
        )
        return (keys * scales[0]).to(dtype), (values * scales[1]).to(dtype)


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x [..., d] as numbers of 8 bits, and the scales [...] in bfloat16 that they are multiplied with.

    Scales are rounded up, so that no number is beyond the largest.
    """
    wide = x.float()
    scales = (wide.abs().amax(-1) / MOST[dtype]).clamp_min(LEAST_SCALE)
    scales = ((scales.view(torch.int32) + LOW_BITS) & ~LOW_BITS).view(torch.float32)
    numbers = wide / scales[..., None]
    if dtype is torch.int8:
        numbers = torch.floor(numbers + 0.5)
    return numbers.to(dtype), scales.bfloat16()


def _bits(numbers: Tensor) -> Tensor:
    """Return a view that all of torch's operations take: few take float8."""
    return numbers.view(torch.int8)


@dataclass(slots=True)
class Context:
    """The rows of one chunk: consecutive in the batch, and consecutive positions of a sequence."""

    row: int
    """The chunk's first row in the batch."""
    length: int
    """Its rows."""
    blocks: Sequence[int]
    """The sequence's cache blocks."""
    end: int
    """Tokens of context, the chunk included."""
    tables: tuple[Sequence[int], ...] = ()
    """Cache blocks for each group of layers that see equally far; none: all have the same. GONE stands for
    those that no row of the chunk sees."""
    slot: int = NOWHERE
    """Slot of the sequence's state."""
    second: int = NEVER
    """Position of the first token of the second text, where the sequence is a pair."""

    def table(self, group: int) -> Sequence[int]:
        """The cache blocks of a group of layers."""
        return self.tables[group] if self.tables else self.blocks


@dataclass(frozen=True)
class _Prefill:
    rows: slice
    index: Tensor
    """[seen]: cache rows of the context that the chunk sees."""
    mask: Tensor | None
    """[length, seen]; None where the chunk sees itself and nothing before."""


@dataclass(frozen=True)
class _Decode:
    table: Tensor
    """[D, longest]: cache rows that each decoding row sees. Padding is multiplied by 0, so it is the sequence's
    own: what others left in the cache may be NaN."""
    mask: Tensor
    """[D, longest]: 0, and -inf for padding."""


@dataclass(frozen=True)
class _Plan:
    """The cache rows that a step's rows see, for layers of one window."""

    write_rows: Tensor
    """[T]: where their keys and values go in the cache."""
    decode: _Decode | None
    prefills: tuple[_Prefill, ...]


class PagedAttention:
    """The plan of one step, shared by all layers."""

    def __init__(
        self,
        contexts: Sequence[Context],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        """Plan a step; windows are those of the groups of layers, whose blocks are apart."""
        self._step = contexts, block_size, dtype, device
        decodes = [context.row for context in contexts if context.length == 1]
        self._decode_rows = torch.tensor(decodes, dtype=torch.int64, device=device)
        self._all_decode = len(decodes) == len(contexts)
        self._groups = {window: group for group, window in enumerate(windows)}
        self._plans: dict[tuple[int | None, bool], _Plan] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KeysValues,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Write k and v [T, kv, d] to the cache, and return what q [T, heads, d] attends to.

        Of a layer that reads another's, k and v are not looked at. sinks [heads] are scores of what every row
        sees besides, and which has no value.
        """
        kind = spec.window, spec.tumbling
        if kind not in self._plans:
            contexts, block_size, dtype, device = self._step
            cached = [_cache_rows(context, self._groups[spec.window], block_size) for context in contexts]
            self._plans[kind] = _plan(contexts, cached, spec, dtype, device)
        plan = self._plans[kind]
        if spec.keys_of is None:
            cache.write(plan.write_rows, k, v)
        out = torch.empty_like(q) if plan.prefills else q
        for prefill in plan.prefills:
            out[prefill.rows] = self._prefill(q, cache, spec, prefill, sinks)
        if plan.decode is not None:
            order = self._decode_rows
            in_order = self._all_decode and len(order) == len(q)
            rows = q if in_order else q[order]
            decoded = self._decode(rows, cache, spec, plan.decode, sinks)
            if in_order:
                return decoded
            out[order] = decoded
        return out

    def _decode(
        self, q: Tensor, cache: KeysValues, spec: AttentionSpec, plan: _Decode, sinks: Tensor | None
    ) -> Tensor:
        """One query row per sequence: [D, heads, d]."""
        num, heads, dim = q.shape
        kv = len(cache.keys)
        group = heads // kv
        length = plan.table.shape[1]
        keys, values = (part.view(kv * num, length, dim) for part in cache.read(plan.table.view(-1), q.dtype))
        query = q.view(num, kv, group, dim).transpose(0, 1).reshape(kv * num, group, dim)
        mask = plan.mask.repeat(kv, 1).unsqueeze(1)
        if spec.softcap is None:
            scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=spec.scale)
        else:
            scores = _scores(torch.bmm(query, keys.transpose(1, 2)), spec) + mask
        if sinks is not None:
            sinks = sinks.view(kv, 1, group, 1).expand(-1, num, -1, -1).reshape(kv * num, -1, 1)
        out = torch.bmm(_weights(scores, sinks), values)
        return out.view(kv, num, group, dim).transpose(0, 1).reshape(num, heads, dim)

    def _prefill(
        self, q: Tensor, cache: KeysValues, spec: AttentionSpec, plan: _Prefill, sinks: Tensor | None
    ) -> Tensor:
        """A chunk of one sequence: [length, heads, d]."""
        keys, values = cache.read(plan.index, q.dtype)
        if spec.softcap is None and sinks is None:
            return attend_chunk(q[plan.rows], keys, values, plan.mask, spec.scale)
        query = q[plan.rows].transpose(0, 1)[None]
        group = query.shape[1] // len(keys)
        keys, values = (part.repeat_interleave(group, dim=0)[None] for part in (keys, values))
        scores = _scores(query @ keys.transpose(-1, -2), spec)
        mask = torch.ones_like(scores, dtype=torch.bool).tril() if plan.mask is None else plan.mask
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = _weights(scores, None if sinks is None else sinks[:, None, None])
        return (weights @ values)[0].transpose(0, 1)


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return what q [length, heads, d] attends to among keys and values [kv heads, seen, d], like q.

    The mask [length, seen] is torch's; None where a chunk sees itself and nothing before.
    """
    out = scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None],
        attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _plan(
    contexts: Sequence[Context],
    rows: Sequence[Tensor],
    spec: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan:
    """Plan for layers of one window; rows are the cache rows of every context."""
    firsts = [_first_seen(context.end - context.length, spec) for context in contexts]
    seen = [index[max(0, first) :] for first, index in zip(firsts, rows, strict=True)]
    decodes = [index for context, index in zip(contexts, seen, strict=True) if context.length == 1]
    prefills = tuple(
        _Prefill(
            rows=slice(context.row, context.row + context.length),
            index=index.to(device),
            mask=_mask(context, spec, device),
        )
        for context, index in zip(contexts, seen, strict=True)
        if context.length > 1
    )
    written = torch.cat([index[c.end - c.length :] for index, c in zip(rows, contexts, strict=True)])
    return _Plan(written.to(device), _decode(decodes, dtype, device) if decodes else None, prefills)


def _decode(seen: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> _Decode:
    longest = max(map(len, seen))
    table = torch.empty(len(seen), longest, dtype=torch.int64)
    mask = torch.full((len(seen), longest), float("-inf"), dtype=dtype)
    for place, index in enumerate(seen):
        table[place, : len(index)] = index
        table[place, len(index) :] = index[-1]
        mask[place, : len(index)] = 0
    return _Decode(table.to(device), mask.to(device))


def _first_seen(at: At, spec: AttentionSpec) -> At:
    """Return the first positions that rows at these positions see; those below 0 do not exist."""
    if spec.window is None:
        return at * 0
    return at // spec.window * spec.window if spec.tumbling else at - spec.window + 1


def _cache_rows(context: Context, group: int, block_size: int) -> Tensor:
    """[end]: the cache row of every position of the context."""
    blocks = torch.from_numpy(np.array(context.table(group), dtype=np.int64))
    return (blocks[:, None] * block_size + torch.arange(block_size)).view(-1)[: context.end]


def _mask(context: Context, spec: AttentionSpec, device: torch.device) -> Tensor | None:
    """[length, seen]: True where a row may look; None where that is plain causality within the chunk."""
    start = context.end - context.length
    if start == 0 and (spec.window is None or spec.window >= context.length):
        return None
    rows = torch.arange(start, context.end, device=device)[:, None]
    columns = torch.arange(max(0, _first_seen(start, spec)), context.end, device=device)
    return (rows >= columns) & (columns >= _first_seen(rows, spec))


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of scores [..., seen] beside sinks [..., 1]."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.to(scores).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def _scores(products: Tensor, spec: AttentionSpec) -> Tensor:
    if spec.softcap is None:
        return products * spec.scale
    return torch.tanh(products * (spec.scale / spec.softcap)) * spec.softcap
