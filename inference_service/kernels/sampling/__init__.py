"""From logits to tokens on the device, in two launches for a whole batch, without sorting the vocabulary.

::

    race_kernel   logits [N, V] -> best score and its token of every tile of every row
    pick_kernel   -> ids [N]; rows with top-k, top-p or min-p search their threshold and race again

Temperature, then min-p, then top-k, then top-p on what is left, then an exponential race (Gumbel-max): the
token of the largest logit / temperature + noise wins, and without a temperature the one of the largest logit,
the lowest on ties. The noise is a function of the request's seed, the number of its tokens and the token, so
that a draw is the same, bit for bit, in any company; ``host.draw`` draws the same on a CPU. What else changes
logits (bias, penalties, grammars) comes before.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.kernels.sampling.host import draw
from inference_service.kernels.sampling.launch import plan, sample
from inference_service.kernels.sampling.layout import RowParams, SamplingTables, pack_rows

__all__ = ["RowParams", "SamplingTables", "draw", "pack_rows", "plan", "sample"]
