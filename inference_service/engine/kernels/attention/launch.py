"""Launches from tensors: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference_service.engine.kernels.attention import tuning
from inference_service.engine.kernels.attention.inputs import HeadNorm, Inputs
from inference_service.engine.kernels.attention.layout import AttentionTables
from inference_service.engine.kernels.launch import Launch, kernels_of, require
from inference_service.engine.kernels.packing import block_of, power_of_two
from inference_service.engine.kernels.sgmv import PLACES, Slices, Update
from loramux_shared.bases.rope import AttentionSpec

LOG2_E = math.log2(math.e)
MAX_GRID = 65535
"""Programs along the second and third axis of a grid."""


def attend(
    inputs: Inputs,
    tables: AttentionTables,
    spec: AttentionSpec,
    norm: HeadNorm | None = None,
    sinks: Tensor | None = None,
    update: Update | None = None,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values to the cache, attend: [T, query heads, d].

    Rows that belong to no chunk are 0, and write nothing. Launches depend on capacities and addresses alone, so
    that they stay right for whatever the tables hold when they run.

    Args:
        inputs: the layer's tensors.
        tables: which rows see what; all chunks lie within the rows of the inputs.
        spec: how the layer attends.
        norm: of queries and keys, if the layer has one.
        sinks: fp32 [query heads], if the layer has them: scores of what every row sees besides, and which has
            no value.
        update: what is to be added to the heads.
    """
    kernels = kernels_of(__name__, inputs.heads)
    _check_tables(inputs, tables)
    if sinks is not None:
        require(sinks, "sinks", dims=1, dtype=torch.float32, device=inputs.heads.device)
        if len(sinks) != inputs.num_heads:
            raise ValueError(f"sinks must be of {inputs.num_heads} query heads, got {len(sinks)}")
    q, out = (inputs.heads.new_empty(len(inputs.heads), inputs.num_heads, inputs.head_dim) for _ in range(2))
    weights = {"p_sinks": sinks, **_weights(spec, tables.capacity.context)}
    planner = _Planner(kernels, inputs, tables, q, out, weights)
    for launch in (planner.rope(norm, update), *planner.attend()):
        launch()
    return out


@dataclass(frozen=True)
class _Planner:
    """Plans the launches of one layer."""

    kernels: Any
    """The module of kernels."""
    inputs: Inputs
    tables: AttentionTables
    q: Tensor
    out: Tensor
    weights: dict[str, Any]
    """Parameters that make weights of products: sinks, scale, softcap, window."""

    def rope(self, norm: HeadNorm | None, update: Update | None) -> Launch:
        """Update, norm, rotate, write."""
        at, config = self.inputs, self._config(tuning.ROPE)
        per_head = norm is not None and norm.weight.dim() == 2
        arguments = {
            "p_heads": at.heads,
            "p_q": self.q,
            "p_out": self.out,
            "p_keys": at.keys,
            "p_values": at.values,
            "p_cos": at.cos,
            "p_sin": at.sin,
            "p_norm": None if norm is None else norm.weight,
            "p_cache_rows": self.tables.cache_rows,
            "eps": 0.0 if norm is None else norm.eps,
            "offset": 0.0 if norm is None else norm.offset,
            "stride_heads": at.heads.stride(0),
            "stride_turn": at.cos.stride(0),
            "stride_norm": norm.weight.stride(0) if norm is not None and per_head else 0,
            "stride_kv": at.keys.stride(0),
            "stride_cache": at.keys.stride(1),
            "H": at.num_heads,
            "KV": at.written_heads,
            "NORMED": self._normed(norm),
            "D": at.head_dim,
            "ROTARY": at.rotary,
            "ROUND_NORM": norm is not None and per_head and not norm.offset,
            "BLOCK_D": block_of(at.head_dim),
        }
        heads = at.heads.shape[1]
        if update is None:
            arguments |= {"p_scales": at.scales, "stride_scales": at.keys.shape[1]}
            arguments |= {"BLOCK_H": config.block, "num_warps": config.num_warps}
            return Launch(self.kernels.rope_write_kernel, (len(at.heads), -(-heads // config.block)), arguments)
        sizes = update.slices.sizes
        if update.slices != Slices.consecutive(*sizes) or sum(sizes) != heads * at.head_dim:
            raise ValueError(f"the update is of {update.slices}, and there are {heads} heads of {at.head_dim}")
        if at.scales is not None:
            raise ValueError("keys and values of 8 bits are written without an update")
        if any(size % at.head_dim for size in sizes):
            raise ValueError(f"a head of {at.head_dim} lies in two slices of {update.slices}")
        grid = min(update.runs * heads, PLACES)
        config = self._config(tuning.ROPE_UPDATE)
        tiles = {"BLOCK_T": config.block, "num_warps": config.num_warps, "num_stages": 1}
        return Launch(
            self.kernels.rope_write_update_kernel, (grid,), {**arguments, **update.arguments, **tiles}
        )

    def _normed(self, norm: HeadNorm | None) -> int:
        """Return how many heads are normed: those of queries and keys, or also those of values."""
        if norm is None:
            return 0
        at, shape = self.inputs, tuple(norm.weight.shape)
        require(norm.weight, "norm", dims=min(len(shape), 2), device=self.q.device)
        turned = at.num_heads + at.written_heads
        count = shape[0] if len(shape) == 2 else turned
        if shape[-1] != at.head_dim or not turned <= count <= at.heads.shape[1]:
            raise ValueError(f"norm does not fit {turned} heads of {at.head_dim}, got {shape}")
        return count

    def attend(self) -> list[Launch]:
        """Attend for chunks of one row, and for longer ones where there may be any; merge what may be cut."""
        at, capacity = self.inputs, self.tables.capacity
        partial = lse = None
        if capacity.may_cut(self.weights["window"]):
            shape = capacity.partial_rows, at.num_heads
            partial = self.q.new_empty(*shape, at.head_dim, dtype=torch.float32)
            lse = self.q.new_empty(shape, dtype=torch.float32)
        pieces = {"p_partial": partial, "p_lse": lse}
        launches = [self._attend(pieces, self.tables.decodes, 1)]
        if capacity.tile is not None and capacity.tiles:
            launches.append(self._attend(pieces, self.tables.prefills, capacity.tile))
        if partial is not None:
            launches.append(self._merge(pieces))
        return launches

    def _attend(self, pieces: dict[str, Any], items: Tensor, tile: int) -> Launch:
        """Attend for all items, of so many rows at most."""
        at = self.inputs
        decodes, group = tile == 1 and items is self.tables.decodes, at.num_heads // at.kv_heads
        config = self._config(tuning.tiles(decodes=decodes, eight_bits=at.scales is not None))
        block_m = max(config.block_m, power_of_two(group)) if decodes else config.block_m
        if tile * group > block_m:
            raise ValueError(f"a tile has at most {block_m // group} rows, got {tile}")
        arguments = {
            "p_q": self.q,
            "p_out": self.out,
            **pieces,
            "p_keys": at.keys,
            "p_values": at.values,
            "p_scales": at.scales,
            "p_items": items,
            "p_blocks": self.tables.blocks,
            **self.weights,
            "stride_kv": at.keys.stride(0),
            "stride_cache": at.keys.stride(1),
            "stride_scales": at.keys.shape[1],
            "TILE": tile,
            "MIN_SPAN": (tuning.DECODE_BALANCE if decodes else tuning.PREFILL_BALANCE).min_span,
            "GROUP": group,
            "KV": at.kv_heads,
            "D": at.head_dim,
            "BLOCK_SIZE": self.tables.capacity.block_size,
            "BLOCK_M": block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_of(at.head_dim),
            "UPCAST": self.kernels.INTERPRETED,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        return Launch(self.kernels.attend_kernel, (at.kv_heads, len(items)), arguments)

    def _merge(self, pieces: dict[str, Any]) -> Launch:
        """Sum what is in pieces."""
        at, config = self.inputs, self._config(tuning.MERGE)
        arguments = {
            **pieces,
            "p_out": self.out,
            "p_merges": self.tables.merges,
            "H": at.num_heads,
            "D": at.head_dim,
            "BLOCK_S": config.block,
            "BLOCK_D": block_of(at.head_dim),
            "num_warps": config.num_warps,
        }
        return Launch(self.kernels.merge_kernel, (at.num_heads, self.tables.capacity.merges), arguments)

    def _config(self, table: tuning.Tables[tuning.Config]) -> tuning.Config:
        return tuning.config_of(table, self.q.device, self.q.dtype, self.inputs.head_dim)


def _weights(spec: AttentionSpec, longest: int) -> dict[str, Any]:
    """Return the kernels' parameters of a layer, for weights that are powers of two."""
    window = spec.window if spec.window is not None and spec.window < longest else None
    if spec.softcap is None:
        return {"scale": spec.scale * LOG2_E, "softcap": None, "window": window}
    # tanh(x) = 1 - 2 / (2 ** (2 log2(e) x) + 1)
    return {"scale": 2 * LOG2_E * spec.scale / spec.softcap, "softcap": spec.softcap * LOG2_E, "window": window}


def _check_tables(inputs: Inputs, tables: AttentionTables) -> None:
    capacity = tables.capacity
    if tables.packed.device != inputs.heads.device:
        raise ValueError(f"tables must be on {inputs.heads.device}, got {tables.packed.device}")
    if len(inputs.heads) > capacity.rows:
        raise ValueError(f"{len(inputs.heads)} rows, but tables for {capacity.rows}")
    if max(capacity.decode_items, capacity.prefill_items, capacity.merges) > MAX_GRID:
        raise ValueError(f"a grid holds {MAX_GRID} chunks or tiles, got room for {capacity}")
