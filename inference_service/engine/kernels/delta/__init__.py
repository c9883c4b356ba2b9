"""The gated delta rule over states in slots: in plain torch, and in two to five launches of Triton kernels.

::

    conv      rows [T, channels]  -> silu of a convolution over each sequence's last rows; those to the states
    step      chunks of one row   -> the state read and written once, the output normed and gated
    prepare   longer chunks       -> what a tile of rows writes and reads, beside the state before it
    scan      prepared tiles      -> their output, tile after tile, and the state behind them
    gate      that output         -> normed and gated

A *chunk* is a run of rows of one sequence, whose state lies in a slot of its own. All launches are
deterministic: no atomics, and a fixed order of summation.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.delta.inputs import DeltaInputs, DeltaStates, DeltaWeights, StateChunk
from inference_service.engine.kernels.delta.launch import gated_delta
from inference_service.engine.kernels.delta.layout import DeltaCapacity, DeltaTables, pack_delta
from inference_service.engine.kernels.delta.tuning import delta_tile

__all__ = [
    "DeltaCapacity",
    "DeltaInputs",
    "DeltaStates",
    "DeltaTables",
    "DeltaWeights",
    "StateChunk",
    "delta_tile",
    "gated_delta",
    "pack_delta",
]
