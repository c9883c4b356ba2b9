"""The size of an adapter's changes: refuses numbers that no type can hold, and sizes beyond all reason."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.grouping import Grouping
from builder_service.domain.rules.values import Part
from builder_service.domain.safetensors_header import READABLE
from builder_service.domain.vectors import BLOCK
from loramux_shared.bases.config import ModelConfig
from loramux_shared.faults import Finding

LARGEST: Final = 3.389e38
"""Largest number of bfloat16, which is a little below float32's: no type of computations goes further."""
REASON: Final = 100.0
"""Times the norm of the base's weight, from which on an adapter's is worth a warning."""


def check_magnitudes(
    parts: list[Part], base: ModelConfig, weights: BaseTensors | None, report: Grouping
) -> list[Finding]:
    """Report products that overflow, and return a warning of those that dwarf the base's weights.

    Inputs are normed, so a typical one has values around 1: A makes ||A|| / sqrt(rank) of it, and BA, the scale
    included, ||BA|| / sqrt(out). A weight that keeps the size of its input has the norm sqrt(out). The base's
    is read where a product is far beyond that, and counts where it is larger.
    """
    worst, beyond = (0.0, ""), 0
    for part in parts:
        rank, out = part.pair.a.shape[0], part.b_rows[1] - part.b_rows[0]
        most = max(part.norms.a / math.sqrt(rank), part.norms.ba / math.sqrt(out))
        if most > LARGEST:
            report.add(
                "E_MAGNITUDE",
                part.pair.place,
                expected=f"products that bfloat16 and float32 hold, at most {LARGEST:.3e}",
                found=f"{most:.1e} of an input around 1",
                fix="Training diverged: use an earlier checkpoint.",
            )
        elif part.norms.ba > REASON * math.sqrt(out) and part.pair.magnitude is None:
            times = part.norms.ba / max(_norm(part, base, weights), math.sqrt(out))
            beyond += times > REASON
            worst = max(worst, (times, part.pair.place))
    if not beyond:
        return []
    found = f"{worst[0]:.2g} times, and more than {REASON:g} times in {beyond} of {len(parts)} modules"
    expected = f"a product of scale, B and A of at most {REASON:g} times the norm of the base's weight"
    fix = "Training diverged, or lora_alpha is wrong: compare its answers with those of an earlier checkpoint."
    return [Finding(code="W_MAGNITUDE", where=worst[1], expected=expected, found=found, fix=fix)]


def _norm(part: Part, base: ModelConfig, weights: BaseTensors | None) -> float:
    """Return the norm of a module's own rows of the base's weight; 0 where the builder cannot read them."""
    key, (start, stop) = part.pair.key, part.b_rows
    at = f"{base.names.layer.format(index=key.layer)}{key.path}.weight"
    for name in [f"{prefix}{at}" for prefix in base.names.prefixes]:
        file = None if weights is None else weights.find(name)
        if file is None or file.tensors[name].dtype not in READABLE or file.tensors[name].shape[0] < stop:
            continue
        step, total = max(1, BLOCK // part.pair.a.shape[1]), 0.0
        for first in range(start, stop, step):
            rows = file.read(name, (first, min(first + step, stop))).astype(np.float64)
            total += float(np.einsum("ij,ij->", rows, rows))
        return math.sqrt(total)
    return 0.0
