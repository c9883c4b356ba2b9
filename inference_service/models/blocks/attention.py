"""Attention of grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor

from inference_service.backends.base import Operations
from inference_service.kernels.attention import MAX_UPDATED_DIM
from inference_service.models.reader import LayerReader
from inference_service.models.step import CacheSize, LayerCache, Step
from loramux_shared.bases.layers import AttentionLayer


class AttentionBlock:
    """Attends over the cache, which it writes."""

    stateful = False

    def __init__(self, reader: LayerReader, spec: AttentionLayer) -> None:
        """Read the weights.

        Raises:
            CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
        """
        config, names = reader.config, reader.config.names
        self._index = reader.index
        self._cache = self._index if spec.attention.keys_of is None else spec.attention.keys_of
        self._spec = spec
        self._qkv_group, self._o_group = (reader.group(name).name for name in ("attn_q", "attn_dense"))
        self._rope = config.ropes.index(spec.rope)
        self._window = config.windows.index(spec.attention.window)
        projected = names.qkv[: len(reader.group("attn_q").modules)]
        self._qkv = reader.linear("attn_q", projected, bias=config.qkv_bias)
        self._o = reader.linear("attn_dense", (names.o,), bias=config.o_bias)
        self._sinks = None
        if names.sinks is not None:
            self._sinks = reader.get(names.sinks, (spec.num_heads,)).float()
        self._head_norm = self._row_norms = None
        if names.q_norm is not None and names.k_norm is not None:
            if config.qk_norm_of_heads:
                self._head_norm = reader.head_norm(names.q_norm, names.k_norm, spec)
            else:
                self._row_norms = (
                    reader.norm(names.q_norm, spec.q_features),
                    reader.norm(names.k_norm, spec.kv_features),
                )

        self._reads_qkv = (
            spec.gated or spec.values_are_keys or self._row_norms is not None or spec.head_dim > MAX_UPDATED_DIM
        )
        """Whether anything but attention needs heads with what adapters add to them."""

    def new_cache(self, operations: Operations, size: CacheSize) -> LayerCache:
        """Return an empty cache of keys and values; none where another layer's are read."""
        if self._spec.attention.keys_of is not None:
            return ()
        return operations.new_cache(size.rows[self._window], self._spec.heads)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        spec = self._spec
        gate = update = None
        keys, values, *eight_bits = step.cache.layers[self._cache]
        scales = eight_bits[0] if eight_bits else None
        if self._reads_qkv or step.query_factors is not None or scales is not None:
            qkv = step.linear(self._qkv, x, self._index, self._qkv_group)
        else:
            qkv, update = step.begun(self._qkv, x, self._index, self._qkv_group)
        if spec.gated:
            qkv, gate = self._parted(qkv)
        qkv = self._prepared(step, qkv)
        heads = qkv.view(len(x), -1, spec.head_dim)
        if spec.values_are_keys and spec.attention.keys_of is None:
            heads = torch.cat([heads, heads[:, spec.num_heads :]], dim=1)
        turn, norm = step.turns[self._rope], self._head_norm
        attended = step.attention(heads, turn, keys, values, spec.attention, norm, self._sinks, scales, update)
        if gate is not None:
            attended = step.operations.gate(attended, gate)
        return step.linear(self._o, attended, self._index, self._o_group)

    def _parted(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Part queries from gates, of which each head has its own behind it: rows without gates, and gates."""
        spec, rows = self._spec, len(qkv)
        both = qkv[:, : 2 * spec.q_features].view(rows, spec.num_heads, 2, spec.head_dim)
        queries, gate = (both[:, :, part].reshape(rows, -1) for part in range(2))
        return torch.cat([queries, qkv[:, 2 * spec.q_features :]], dim=1), gate

    def _prepared(self, step: Step, qkv: Tensor) -> Tensor:
        """Norm and scale queries and keys in place, as far as attention does not."""
        if self._row_norms is None and step.query_factors is None:
            return qkv
        q = self._spec.q_features
        queries, keys = qkv[:, :q], qkv[:, q : q + self._spec.kv_features]
        if self._row_norms is not None:
            for rows, norm in zip((queries, keys), self._row_norms, strict=True):
                rows.copy_(step.operations.norm(rows.contiguous(), norm, None, None))
        if step.query_factors is not None:
            queries *= step.query_factors
        return qkv
