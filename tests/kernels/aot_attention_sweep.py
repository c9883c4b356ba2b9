"""Attention's kernels for every layer that is served: more than the table of resources holds."""

from collections.abc import Iterator
from itertools import product

from tests.kernels.aot import Variant
from tests.kernels.aot_attention import LAYERS, attends


def variants(architecture: int) -> Iterator[Variant]:
    """Yield all combinations but those that no model has, and those of groups that are compiled as others.

    Sinks beside a cap are the first; groups of 6 and 8 are compiled as those of 7 and 4.
    """
    choices = {**LAYERS, "architecture": (architecture,), "group": (1, 4, 7)}
    for values in product(*choices.values()):
        row = dict(zip(choices, values, strict=True))
        if not (row["sinks"] and row["softcap"]):
            yield from attends(row)
