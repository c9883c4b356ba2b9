"""Mixtures of experts: who computes which token, and the products of all experts together.

::

    route      logits [T, E]                    -> ids, weights [T, k]
    by_expert  ids                              -> pairs of a token and an expert, sorted by expert, and tiles
    grouped    x, weight [E, N, K], pairs       -> [P, N]    one launch, whatever experts are asked for
    combine    y [P, N], weights, pairs         -> [T, N]

Nothing of a step is known on the host: a launch's grid holds the tiles of any step of so many tokens, and those
that a step does not need end at once. Nothing is summed by atomics, and what a token gives does not depend on
the others.

This package needs torch alone; Triton is imported at the first launch.
"""

from inference_service.engine.kernels.experts.launch import by_expert, clamped, combine, grouped, route
from inference_service.engine.kernels.experts.layout import ByExpert, Routed

__all__ = ["ByExpert", "Routed", "by_expert", "clamped", "combine", "grouped", "route"]
