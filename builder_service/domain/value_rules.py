"""The numbers of an adapter: what cannot be stored, and what is worth a warning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.grouping import Grouping
from builder_service.domain.safetensors_header import READABLE, TensorFile
from builder_service.domain.tensor_rules import Pair
from shared.bundle.npy import NUMPY_TYPES, Array, cast
from shared.deployment import Dtype
from shared.faults import Finding

UNDERFLOW_SHARE: Final = 0.01
SCALES: Final = (1e-3, 64.0)
"""Scales outside are legal and rare."""


@dataclass
class _Sums:
    b_zero: bool = True
    float32: int = 0
    nonzero: int = 0
    flushed: int = 0
    worst: float = 0.0
    odd_scales: set[float] = field(default_factory=set)


def check_values(
    file: TensorFile,
    pairs: list[Pair],
    config: AdapterConfig,
    dtype: Dtype,
    report: Grouping,
    progress: Callable[[int], None],
) -> list[Finding]:
    """Read every A and B once; report what cannot be stored, return the warnings."""
    sums = _Sums()
    for pair in pairs:
        scale = _scale(pair, config)
        if not SCALES[0] <= scale <= SCALES[1]:
            sums.odd_scales.add(scale)
        for tensor, factor in ((pair.a, 1.0), (pair.b, scale)):
            if tensor.dtype in READABLE and tensor.size:
                values = file.read(tensor.name)
                _check_tensor(tensor.name, values, factor, dtype, sums, report)
                sums.b_zero &= tensor is pair.a or not np.any(values)
            progress(tensor.size)
    return _warnings(sums, dtype) if pairs else []


def _scale(pair: Pair, config: AdapterConfig) -> float:
    rank = pair.a.shape[0] if pair.a.shape else 0
    return config.scale_of(pair.key.name, rank) if rank else 1.0


def _check_tensor(name: str, values: Array, factor: float, dtype: Dtype, sums: _Sums, report: Grouping) -> None:
    wide = values.astype(np.float32)
    bad = wide.size - int(np.count_nonzero(np.isfinite(wide)))
    if bad:
        report.add(
            "E_NAN",
            name,
            expected="finite values",
            found=f"{bad} of {wide.size} NaN or infinite in the first of them",
            fix="Training diverged: use an earlier checkpoint.",
        )
        return
    stored = cast(values, dtype, factor).astype(np.float32)
    if not np.isfinite(stored).all():
        biggest = float(np.abs(wide).max()) * factor
        report.add(
            "E_OVERFLOW",
            name,
            expected=f"at most {_largest(dtype):.3e} in {dtype}",
            found=f"{biggest:.3e}, scale included",
            fix="Build with lora dtype bfloat16." if dtype is Dtype.FLOAT16 else "Training diverged.",
        )
        return
    scaled = wide * np.float32(factor)
    nonzero = scaled != 0
    sums.nonzero += int(np.count_nonzero(nonzero))
    sums.flushed += int(np.count_nonzero(nonzero & (stored == 0)))
    if values.dtype == np.float32 and dtype is not Dtype.FLOAT32:
        sums.float32 += 1
        kept = nonzero & (stored != 0)
        error = np.abs(stored[kept] - scaled[kept]) / np.abs(scaled[kept])
        sums.worst = max(sums.worst, float(error.max(initial=0.0)))


def _largest(dtype: Dtype) -> float:
    # Of the types here only bfloat16 is unknown to numpy.finfo.
    return 3.3895e38 if dtype is Dtype.BFLOAT16 else float(np.finfo(NUMPY_TYPES[dtype]).max)


def _warnings(sums: _Sums, dtype: Dtype) -> list[Finding]:
    found = []
    if sums.float32:
        error = f"largest relative error {sums.worst:.1e}"
        found.append(
            Finding(
                code="W_FP32", where=f"{sums.float32} tensors", found=f"float32, stored as {dtype}, {error}"
            )
        )
    if sums.b_zero:
        found.append(
            Finding(
                code="W_ZERO_B", found="every lora_B is zero", fix="The adapter changes nothing: untrained?"
            )
        )
    if sums.flushed > UNDERFLOW_SHARE * sums.nonzero:
        share = f"{100 * sums.flushed / sums.nonzero:.1f} % of the values become zero in {dtype}"
        found.append(Finding(code="W_UNDERFLOW", found=share, fix="Build with lora dtype bfloat16 or float32."))
    if sums.odd_scales:
        listed = ", ".join(f"{scale:.6g}" for scale in sorted(sums.odd_scales)[:5])
        expected = f"between {SCALES[0]:g} and {SCALES[1]:g}"
        found.append(Finding(code="W_ALPHA", where="alpha/r", expected=expected, found=listed))
    return found
