"""Attention over a paged cache: in plain torch, and in three to four launches of Triton kernels.

::

    rope_write   heads [T, H + 2 KV, d]   -> q [T, H, d]; those of keys and values, if any, to the cache;
                                             or rope_write_update, which adds what adapters make of them
    attend       q, the cache             -> out of the chunks of one row, or pieces of it
    attend       q, the cache             -> the same of longer chunks; where the capacity has any
    merge        pieces                   -> out; where contexts may be too long for one program

A *chunk* is a run of rows of one sequence; it sees the sequence's cache up to itself. What each program takes
of it, and where its cache blocks are, is in tables that are filled once per step for all layers. All launches
are deterministic: no atomics, and a fixed order of summation.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.attention.inputs import HeadNorm, Inputs
from inference_service.engine.kernels.attention.launch import attend
from inference_service.engine.kernels.attention.layout import (
    MIN_BLOCK_SIZE,
    AttentionCapacity,
    AttentionTables,
    pack_tables,
)
from inference_service.engine.kernels.attention.paged import Context, KeysValues, PagedAttention, attend_chunk
from inference_service.engine.kernels.attention.tuning import MAX_UPDATED_DIM, Cut, cut_of, prefill_tile

__all__ = [
    "MAX_UPDATED_DIM",
    "MIN_BLOCK_SIZE",
    "AttentionCapacity",
    "AttentionTables",
    "Context",
    "Cut",
    "HeadNorm",
    "Inputs",
    "KeysValues",
    "PagedAttention",
    "attend",
    "attend_chunk",
    "cut_of",
    "pack_tables",
    "prefill_tile",
]
