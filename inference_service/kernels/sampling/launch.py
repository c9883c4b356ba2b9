"""From logits to launches: checks, tiles, grids. The only door to the kernels."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from inference_service.kernels.launch import Launch, require, require_device
from inference_service.kernels.sampling.layout import SamplingTables
from inference_service.kernels.sampling.tuning import PICK, RACE

SHIFTS: Final = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits that a dtype lacks at the end of float32: keys of fewer bits need fewer passes."""


def sample(logits: Tensor, tables: SamplingTables, ids: Tensor) -> None:
    """Draw one token per row of logits, as the tables say; ids of padding rows are not touched.

    Args:
        logits: [N, vocab], rows contiguous; NaN counts as -inf, and of a row without any other the answer is 0.
        tables: parameters of N rows or more.
        ids: int32 or int64 [N]: the tokens.

    Raises:
        ValueError: when shapes, dtypes, strides or devices do not fit.
    """
    for launch in plan(logits, tables, ids):
        launch()


def plan(logits: Tensor, tables: SamplingTables, ids: Tensor) -> list[Launch]:
    """The launches of ``sample``; they stay right for whatever the tables and logits hold when they run."""
    kernels = _kernels(logits)
    _check(logits, tables, ids)
    tiles = tables.scores.shape[1]
    config = PICK[logits.dtype.itemsize]
    shared = {
        "p_logits": logits,
        "p_rows": tables.rows,
        "p_scores": tables.scores,
        "p_ids": tables.ids,
        "V": tables.vocab,
        "stride_logits": logits.stride(0),
        "stride_tiles": tiles,
    }
    race = {"BLOCK": RACE.block, "num_warps": RACE.num_warps}
    pick = {
        "p_out": ids,
        "tiles": tiles,
        "TILES": 1 << (tiles - 1).bit_length(),
        "SHIFT": SHIFTS[logits.dtype],
        "LINES": config.lines,
        "BLOCK": config.block,
        "num_warps": config.num_warps,
    }
    return [
        Launch(kernels.race_kernel, (len(logits), tiles), shared | race),
        Launch(kernels.pick_kernel, (len(logits),), shared | pick),
    ]


def _check(logits: Tensor, tables: SamplingTables, ids: Tensor) -> None:
    require(logits, "logits", dims=2)
    require(tables.rows, "tables", dims=2, device=logits.device)
    require(ids, "ids", dims=1, device=logits.device)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64, got {ids.dtype}")
    if logits.shape[1] != tables.vocab:
        raise ValueError(f"logits must have {tables.vocab} columns, got {logits.shape[1]}")
    if len(logits) != len(ids):
        raise ValueError(f"logits and ids must have the same rows, got {len(logits)} and {len(ids)}")
    if len(logits) > len(tables.rows):
        raise ValueError(f"{len(logits)} rows, but tables for {len(tables.rows)}")


def _kernels(tensor: Tensor) -> Any:
    """The module of kernels: imported here, for machines without a GPU need no Triton."""
    from inference_service.kernels.sampling import triton_kernels

    require_device(tensor, interpreted=triton_kernels.INTERPRETED)
    return triton_kernels
