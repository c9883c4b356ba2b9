"""Attention over a paged cache, in plain torch: gather the context, then two batched products.

The cache of a layer is [kv heads, cache rows, head_dim], so that a gathered context is ready for a batched
product, and the queries of a group (GQA) are folded into the query axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class _Prefill:
    rows: slice
    index: Tensor
    """[end]: cache rows of the context."""
    mask: Tensor | None
    """[length, end]; None where the chunk is the whole context."""


class PagedAttention:
    """The plan of one step, shared by all layers."""

    def __init__(
        self,
        contexts: Sequence[Context],
        block_size: int,
        groups: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Plan a step; groups is the number of query heads per kv head."""
        self._groups = groups
        rows = [_cache_rows(context, block_size) for context in contexts]
        self.write_rows = torch.cat([r[c.end - c.length :] for r, c in zip(rows, contexts, strict=True)]).to(
            device
        )
        decodes = [index for index, context in enumerate(contexts) if context.length == 1]
        self._decode_rows: Tensor | None = None
        if decodes:
            self._decode_rows = torch.tensor([contexts[index].row for index in decodes], device=device)
            lengths = [contexts[index].end for index in decodes]
            longest = max(lengths)
            table = torch.zeros(len(decodes), longest, dtype=torch.int64)
            mask = torch.full((len(decodes), longest), float("-inf"), dtype=dtype)
            for place, index in enumerate(decodes):
                table[place, : lengths[place]] = rows[index]
                mask[place, : lengths[place]] = 0
            self._decode_table = table.to(device)
            self._decode_mask = mask.to(device)
        self._prefills = [
            _Prefill(
                rows=slice(context.row, context.row + context.length),
                index=index.to(device),
                mask=_causal_mask(context, device) if context.end != context.length else None,
            )
            for context, index in zip(contexts, rows, strict=True)
            if context.length > 1
        ]
        self._all_decode = not self._prefills and self._decode_rows is not None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> Tensor:
        """Write k and v [T, kv, d] to the cache [kv, rows, d], and return what q [T, heads, d] attends to."""
        k_cache.index_copy_(1, self.write_rows, k.transpose(0, 1))
        v_cache.index_copy_(1, self.write_rows, v.transpose(0, 1))
        out = torch.empty_like(q) if self._prefills else q
        for prefill in self._prefills:
            out[prefill.rows] = self._prefill(q, k_cache, v_cache, scale, prefill)
        if self._decode_rows is not None:
            order = self._decode_rows
            decoded = self._decode(q if self._in_order(order, q) else q[order], k_cache, v_cache, scale)
            if self._in_order(order, q):
                return decoded
            out[order] = decoded
        return out

    def _in_order(self, order: Tensor, q: Tensor) -> bool:
        return self._all_decode and order.shape[0] == q.shape[0]

    def _decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> Tensor:
        """One query row per sequence: [D, heads, d]."""
        num, heads, dim = q.shape
        kv = heads // self._groups
        length = self._decode_table.shape[1]
        flat = self._decode_table.view(-1)
        keys = k_cache.index_select(1, flat).view(kv * num, length, dim)
        values = v_cache.index_select(1, flat).view(kv * num, length, dim)
        query = q.view(num, kv, self._groups, dim).transpose(0, 1).reshape(kv * num, self._groups, dim)
        mask = self._decode_mask.repeat(kv, 1).unsqueeze(1)
        scores = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scale)
        out = torch.bmm(torch.softmax(scores, dim=-1), values)
        return out.view(kv, num, self._groups, dim).transpose(0, 1).reshape(num, heads, dim)

    def _prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, plan: _Prefill) -> Tensor:
        """A chunk of one sequence: [length, heads, d]."""
        query = q[plan.rows].transpose(0, 1)[None]
        keys = k_cache.index_select(1, plan.index).repeat_interleave(self._groups, dim=0)[None]
        values = v_cache.index_select(1, plan.index).repeat_interleave(self._groups, dim=0)[None]
        out = scaled_dot_product_attention(
            query, keys, values, attn_mask=plan.mask, is_causal=plan.mask is None, scale=scale
        )
        return out[0].transpose(0, 1)


def _cache_rows(context: Context, block_size: int) -> Tensor:
    """[end]: the cache row of every position of the context."""
    blocks = torch.tensor(context.blocks, dtype=torch.int64)
    return (blocks[:, None] * block_size + torch.arange(block_size)).view(-1)[: context.end]


def _causal_mask(context: Context, device: torch.device) -> Tensor:
    """[length, end]: True where a row may look."""
    rows = torch.arange(context.end - context.length, context.end, device=device)
    return rows[:, None] >= torch.arange(context.end, device=device)
