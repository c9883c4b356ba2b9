"""Launches from logits: checks, tiles, grids. The only entry to the kernels.

Each function raises `ValueError` where shapes, dtypes, strides or devices do not fit.

Launches stay right for whatever tables and logits hold when they run; those of shaped rows do not when the
state gets memory for what it had none for.
"""

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels.launch import Launch, kernels_of, require
from inference_service.engine.kernels.packing import power_of_two
from inference_service.engine.kernels.sampling.layout import SamplingTables
from inference_service.engine.kernels.sampling.shaping import ShapingState, ShapingTables, num_words
from inference_service.engine.kernels.sampling.tuning import EDIT, PICK, RACE, SHAPE

SHIFTS: Final = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Bits that a dtype lacks at the end of float32: keys of fewer bits need fewer passes."""


def sample(logits: Tensor, tables: SamplingTables, ids: Tensor) -> None:
    """Draw one token per row of logits, as the tables say; ids of padding rows are not touched.

    Args:
        logits: [N, vocab], rows contiguous; NaN counts as -inf, and of a row without any other the answer is 0.
        tables: parameters of N rows or more.
        ids: int32 or int64 [N]: the tokens.
    """
    kernels = kernels_of(__name__, logits)
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
    pick = {
        "p_out": ids,
        "tiles": tiles,
        "TILES": power_of_two(tiles),
        "SHIFT": SHIFTS[logits.dtype],
        "LINES": config.lines,
        "BLOCK": config.block,
        "num_warps": config.num_warps,
    }
    Launch(kernels.race_kernel, (len(logits), tiles), shared | RACE.arguments)()
    Launch(kernels.pick_kernel, (len(logits),), shared | pick)()


def sample_shaped(logits: Tensor, tables: ShapingTables, state: ShapingState, ids: Tensor) -> None:
    """Draw the tokens of the rows that requests shape, and note them in the state; other ids are not touched.

    Args:
        logits: [N, vocab], rows contiguous; they stay as they are. NaN counts as -inf.
        tables: rows of these logits, each once and each at another place.
        state: what the sequences at these places have said. Where all of a row is -inf after what its request
            does to it, ``impossible`` of the row becomes 1, else 0.
        ids: int32 or int64 [N]: the tokens.
    """
    kernels = kernels_of(__name__, logits)
    require(logits, "logits", dims=2)
    require(tables.packed, "tables", dims=1, dtype=torch.int32, device=logits.device)
    require(state.last, "state", dims=1, dtype=torch.int32, device=logits.device)
    if not logits.shape[1] == tables.draw.vocab == state.vocab:
        raise ValueError(f"logits must have {state.vocab} columns, got {logits.shape[1]}")
    if len(ids) > len(state.impossible):
        raise ValueError(f"{len(ids)} rows, but a state for {len(state.impossible)}")
    rows, vocab = tables.shaped.shape
    tiles = tables.draw.scores.shape[1]
    shared = {"p_packed": tables.packed, "V": vocab}
    shape = {
        "p_logits": logits,
        "p_shaped": tables.shaped,
        "p_counts": state.counts,
        "p_masks": state.masks,
        "words": num_words(vocab),
        "stride_logits": logits.stride(0),
        **SHAPE.arguments,
        "enable_fp_fusion": False,
    }
    edit = {
        "p_shaped": tables.shaped,
        "p_last": state.last,
        "ENTRIES": EDIT.entries,
        "BLOCK": EDIT.block,
        "num_warps": EDIT.num_warps,
    }
    note = {
        "p_drawn": tables.drawn,
        "p_scores": tables.draw.scores,
        "p_out": ids,
        "p_impossible": state.impossible,
        "p_last": state.last,
        "p_counts": state.counts,
        "tiles": tiles,
        "TILES": power_of_two(tiles),
        "num_warps": 1,
    }
    Launch(kernels.shape_kernel, (rows, -(-vocab // SHAPE.block)), shared | shape)()
    Launch(kernels.edit_kernel, (rows,), shared | edit)()
    sample(tables.shaped, tables.draw, tables.drawn)
    Launch(kernels.note_kernel, (rows,), shared | note)()


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
