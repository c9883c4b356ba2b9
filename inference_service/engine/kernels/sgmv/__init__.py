"""SGMV: many adapters' low-rank updates of one fused linear, in two launches.

::

    shrink   x [T, K], a, table, segments   -> y [planes, P, rows]   fp32
    expand   y, b, table, segments          -> out [T, N]            added in place

A *group* is one fused linear of 1-3 slices that share ``x`` (q, k, v | o | gate, up | down). An adapter in a
*slot* has its own rank in every slice, 0 where it does not adapt it; ranks are packed, never padded. The
tokens of a step are grouped into *segments*, runs of one slot's tokens, once per step for all layers. The fewer
tiles the segments of a step have, the more planes shrink divides K into, so that few adapters cover the device
too, whatever is loaded. Results are deterministic: nothing is summed by atomics, and the order of summation
follows from the segments and their ranks. Rows of base tokens are never touched.

Where the capacity of a step says so, its segments hold all rows, and a kernel that reads a linear's output
anyway adds the update itself (`Update`): then expand is not launched.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.sgmv.launch import Update, expand, shrink, update, workspace_numel
from inference_service.engine.kernels.sgmv.layout import (
    Group,
    Phase,
    SegmentCapacity,
    Segments,
    Slices,
    pack_segments,
    pack_table,
)
from inference_service.engine.kernels.sgmv.tuning import DECODE_TILE, PLACES, PREFILL_TILE

__all__ = [
    "DECODE_TILE",
    "PLACES",
    "PREFILL_TILE",
    "Group",
    "Phase",
    "SegmentCapacity",
    "Segments",
    "Slices",
    "Update",
    "expand",
    "pack_segments",
    "pack_table",
    "shrink",
    "update",
    "workspace_numel",
]
