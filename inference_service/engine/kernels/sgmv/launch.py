"""Launches from tensors: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit. Launches depend on
capacities and addresses alone, so that they stay right whatever segments, table and weights hold when they run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference_service.engine.kernels.launch import Launch, architecture_of, kernels_of, require
from inference_service.engine.kernels.packing import power_of_two
from inference_service.engine.kernels.sgmv.layout import FIELDS, Group, Segments, Slices
from inference_service.engine.kernels.sgmv.tuning import (
    ExpandConfig,
    ShrinkConfig,
    expand_config,
    phase_of,
    shrink_config,
)


@dataclass(frozen=True)
class Update:
    """The part that adapters add to a fused linear's output, for a kernel that reads all rows of it anyway.

    Its programs share the (runs of rows, tiles of columns) as those of expand do.
    """

    arguments: Mapping[str, Any]
    """Arguments of the kernels' functions: of `with_update` and those that it needs."""
    slices: Slices
    config: ExpandConfig
    runs: int
    """Runs of rows at most."""


def workspace_numel(group: Group, segments: Segments) -> int:
    """Return the elements of the workspace that ``shrink`` and ``expand`` of this group share.

    Its content is of no interest before or after, so all layers share one.
    """
    return _shrink_config(group, segments).numel(group.in_features, group.max_rows, segments.capacity)


def _shrink_config(group: Group, segments: Segments) -> ShrinkConfig:
    weights = group.weights
    where = architecture_of(weights.device), phase_of(segments.capacity.tile), weights.dtype
    return shrink_config(*where, max_rows=group.max_rows)


def shrink(x: Tensor, group: Group, segments: Segments, workspace: Tensor) -> Launch:
    """Return the first launch, which needs no output of the base: x [T, K] times A, in an fp32 workspace."""
    config = _shrink_config(group, segments)
    numel = config.numel(group.in_features, group.max_rows, segments.capacity)
    require(workspace, "workspace", dims=1, dtype=torch.float32, device=x.device)
    if workspace.numel() < numel:
        raise ValueError(f"workspace must hold {numel} elements, got {workspace.numel()}")
    kernels, weights = kernels_of(__name__, x), group.weights
    slices = _check_table(group.table, segments, x.device)
    require(x, "x", dims=2)
    require(weights, "weights", dims=1, dtype=x.dtype, device=x.device)
    _check_segments(segments, x.device)
    if group.in_features != x.shape[1]:
        raise ValueError(f"A and x must have the same K, got {group.in_features} and {x.shape[1]}")
    return Launch(
        kernels.shrink_kernel,
        (config.grid(x.shape[1], group.max_rows, segments.capacity),),
        {
            **_planes(group, segments, workspace),
            "p_x": x,
            "p_a": weights,
            "p_table": group.table,
            "p_token_ids": segments.token_ids,
            "p_seg_start": segments.seg_start,
            "p_seg_slot": segments.seg_slot,
            "p_scales": segments.scales,
            "K": x.shape[1],
            "blocks": -(-x.shape[1] // config.block_k),
            "split_k": config.split_k,
            "stride_x": x.stride(0),
            "stride_a": group.stride_a,
            "stride_table": group.table.stride(0),
            "N_SLICES": slices,
            "BLOCK_T": config.block_t,
            "BLOCK_R": config.block_r,
            "BLOCK_K": config.block_k,
            "UPCAST": kernels.INTERPRETED,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )


def expand(out: Tensor, group: Group, segments: Segments, workspace: Tensor) -> list[Launch]:
    """Return the launches behind ``shrink``, one per pass, which add to out [T, N] where rows have an entry."""
    kernels, slices = kernels_of(__name__, out), group.slices
    if _check_table(group.table, segments, out.device) != len(slices.sizes):
        shape = tuple(group.table.shape)
        raise ValueError(f"table must be [slots, {len(slices.sizes)}, {FIELDS}], got {shape}")
    require(out, "out", dims=2)
    require(group.weights, "weights", dims=1, dtype=out.dtype, device=out.device)
    if out.shape[1] < slices.out_features:
        raise ValueError(f"out must have {slices.out_features} columns, got {out.shape[1]}")
    config = _expand_config(group, segments)
    arguments = {
        **_factors(kernels, group, segments, workspace),
        "p_out": out,
        "stride_out": out.stride(0),
        "STEP_N": config.step_n,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    grid = config.grid(slices, segments.capacity.segments_per_pass)
    return [
        Launch(kernels.expand_kernel, (grid,), arguments | {"p_pass": segments.of_pass(index)})
        for index in range(segments.capacity.passes)
    ]


def update(group: Group, segments: Segments, workspace: Tensor) -> Update:
    """Return what ``expand`` would add behind ``shrink``, where all rows are in segments."""
    if not len(segments.num_runs):
        raise ValueError(f"the rows without an adapter are in no segment of {segments.capacity}")
    arguments = _factors(kernels_of(__name__, group.weights), group, segments, workspace)
    arguments["p_num_runs"] = segments.num_runs
    return Update(arguments, group.slices, _expand_config(group, segments), segments.capacity.runs)


def _expand_config(group: Group, segments: Segments) -> ExpandConfig:
    weights = group.weights
    where = architecture_of(weights.device), phase_of(segments.capacity.tile), weights.dtype
    return expand_config(*where, max_rank=group.max_rank)


def _factors(kernels: Any, group: Group, segments: Segments, workspace: Tensor) -> dict[str, Any]:
    """Return the arguments of whatever multiplies y with B."""
    slices, config = group.slices, _expand_config(group, segments)
    most_planes, _ = _shrink_config(group, segments).planes(group.in_features, 1)
    return {
        **_planes(group, segments, workspace),
        "p_b": group.weights,
        "p_vectors": group.floats,
        "p_table": group.table,
        "p_token_ids": segments.token_ids,
        "p_seg_start": segments.seg_start,
        "p_seg_slot": segments.seg_slot,
        "stride_table": group.table.stride(0),
        "OFFSETS": slices.offsets,
        "SIZES": slices.sizes,
        "ALIGNMENT": slices.alignment,
        "N_SLICES": len(slices.sizes),
        "PLANES": power_of_two(most_planes),
        "BLOCK_T": config.block_t,
        "BLOCK_R": config.block_r,
        "UPCAST": kernels.INTERPRETED,
    }


def _planes(group: Group, segments: Segments, workspace: Tensor) -> dict[str, Any]:
    """Return the arguments that shrink and expand share."""
    return {
        "p_y": workspace,
        "p_planes": segments.planes,
        "p_end": segments.pass_start[-2:],
        "stride_y": group.max_rows,
    }


def _check_table(table: Tensor, segments: Segments, device: torch.device) -> int:
    """Return the number of slices."""
    require(table, "table", dims=3, device=device)
    if table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"table must be int32 or int64, got {table.dtype}")
    if table.shape[2] != FIELDS or table.stride()[1:] != (FIELDS, 1):
        raise ValueError(
            f"table must be [slots, slices, {FIELDS}] with contiguous slots, got {tuple(table.shape)} with "
            f"strides {table.stride()}"
        )
    if table.shape[0] < segments.capacity.slots:
        raise ValueError(f"segments have {segments.capacity.slots} slots, table only {table.shape[0]}")
    return table.shape[1]


def _check_segments(segments: Segments, device: torch.device) -> None:
    if segments.packed.device != device:
        raise ValueError(f"segments must be on {device}, got {segments.packed.device}")
