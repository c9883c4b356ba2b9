"""Sampling of tokens from logits on the device, in two launches for a whole batch, without sorting the
vocabulary.

::

    race_kernel   logits [N, V] -> best score and its token of every tile of every row
    pick_kernel   -> ids [N]; rows with top-k, top-p or min-p search their threshold and race again

Temperature, then min-p, then top-k, then top-p on what is left, then an exponential race (Gumbel-max): the
token of the largest logit / temperature + noise wins, and without a temperature the one of the largest logit,
the lowest on ties. The noise is a function of the request's seed, the number of its tokens and the token, so
that a draw is the same, bit for bit, in every batch; ``host.draw`` draws the same on a CPU.

Rows whose logits a request shapes (penalties, bias, grammars, tokens that may not come) are drawn by three
launches more, over those rows alone::

    shape_kernel  logits [N, V] -> penalties and masks of the M rows, float32 [M, V]
    edit_kernel   -> biases, last tokens of bad words, stop tokens
    race_kernel, pick_kernel
    note_kernel   -> ids [N], and the state: each sequence's tokens, its last one included

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.sampling.host import NO_TOKEN, Drawn, draw, draw_rows, scores
from inference_service.engine.kernels.sampling.launch import sample, sample_shaped
from inference_service.engine.kernels.sampling.layout import Edits, RowParams, SamplingTables, pack_rows
from inference_service.engine.kernels.sampling.shaping import (
    ShapedRow,
    ShapingState,
    ShapingTables,
    pack_shapes,
)

__all__ = [
    "NO_TOKEN",
    "Drawn",
    "Edits",
    "RowParams",
    "SamplingTables",
    "ShapedRow",
    "ShapingState",
    "ShapingTables",
    "draw",
    "draw_rows",
    "pack_rows",
    "pack_shapes",
    "sample",
    "sample_shaped",
    "scores",
]
