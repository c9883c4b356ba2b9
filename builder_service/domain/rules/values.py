"""The numbers of an adapter: what cannot be stored, what is worth a warning, and how big each row is.

Numbers that no type can hold are refused, and so are sizes beyond all reason.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.derived import NotMade
from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import Pair
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.vectors import BLOCK_ELEMENTS
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import NO_LAYER, Module
from loramux_shared.bundle.npy import NUMPY_TYPES, Array, cast
from loramux_shared.deployment import Dtype
from loramux_shared.faults import Finding

DIGITS: Final = 5
"""Significant digits that are kept: sums in float64 differ between machines in the sixteenth."""


@dataclass(frozen=True)
class Norms:
    """Frobenius norms, rounded to `DIGITS` significant digits."""

    a: float
    b: float
    ba: float


def row_norms(a: Array, b: Array) -> Norms:
    """Return the norms of A ``(rank, in)``, B ``(out, rank)`` and BA; BA itself is never formed.

    ``||BA||² = tr((BᵀB)(AAᵀ))``, which needs two (rank, rank) matrices.
    """
    gram_a, gram_b = _gram(a.T), _gram(b)
    return Norms(
        a=_rounded(math.sqrt(np.trace(gram_a))),
        b=_rounded(math.sqrt(np.trace(gram_b))),
        ba=_rounded(math.sqrt(max(0.0, float(np.sum(gram_a * gram_b))))),
    )


def _gram(tall: Array) -> Array:
    """Return ``XᵀX`` of X ``(n, rank)`` in float64."""
    rank = tall.shape[1]
    total: Array = np.zeros((rank, rank))
    step = max(1, PIECE_ELEMENTS // rank)
    for start in range(0, len(tall), step):
        wide = tall[start : start + step].astype(np.float64)
        total += np.dot(wide.T, wide)  # np.dot runs beside other threads, unlike @
    return total


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")


UNDERFLOW_SHARE: Final = 0.01
SCALES: Final = (1e-3, 64.0)
"""Scales outside are legal and rare."""
EXACT: Final = "values that the storage type can hold"
PIECE_ELEMENTS: Final = 1 << 18
"""Elements that are looked at at once; what fits a core's cache."""

INFINITY: Final = {kind: np.array(np.inf, kind).view(f"u{kind.itemsize}")[()] for kind in READABLE.values()}
"""Magnitude of infinity by type, as `magnitudes` has it; those of NaN are above it."""


@dataclass(frozen=True)
class Part:
    """A pair's part for one module: all of A, and the module's own rows of B."""

    pair: Pair
    module: Module
    b_rows: tuple[int, int]
    scale: float
    norms: Norms


@dataclass
class _RowSums:
    narrowed: Counter[str] = field(default_factory=Counter)
    """Tensors with values that were rounded, by what they were."""
    nonzero: int = 0
    flushed: int = 0
    worst: float = 0.0
    """Relative error of a value."""
    odd_scales: set[float] = field(default_factory=set)


@dataclass
class Values:
    """The results of reading all numbers of an adapter."""

    parts: list[Part]
    """Parts in the order of a bundle's rows; complete where nothing was reported."""
    warnings: list[Finding]


def check_values(
    file: TensorFile,
    pairs: list[Pair],
    own: list[str],
    config: AdapterConfig,
    base: ModelConfig,
    dtype: Dtype,
    report: Grouping,
    progress: Callable[[int], None],
) -> Values:
    """Read every A and B once, and own tensors of embeddings and head; report what cannot be stored."""
    sums, parts = _RowSums(), []
    for pair in pairs:
        # The layer was refused already, and a hostile file has thousands of such pairs.
        if base.dims.num_layers <= pair.key.layer != NO_LAYER:
            progress(pair.a.size + pair.b.size)
            continue
        if not _fits(pair, base) and file.origins(pair.a.name) != (pair.a.name,):
            continue  # a tensor that is made of small ones can have any size
        scale = _scale(pair, config)
        if not SCALES[0] <= abs(scale) <= SCALES[1]:
            sums.odd_scales.add(scale)
        try:
            a = _stored(file, pair.a, 1.0, dtype, sums, report)
            progress(pair.a.size)
            b = _stored(file, pair.b, scale, dtype, sums, report)
        except NotMade as problem:
            report.add(
                problem.code,
                pair.place,
                cause=problem.found,
                expected="tensors that follow from the file and the base",
                found=problem.found,
                fix=problem.fix,
            )
            continue
        progress(pair.b.size)
        if a is not None and b is not None and not report and _fits(pair, base):
            parts += [
                Part(pair, module, rows, scale, row_norms(a, b[slice(*rows)]))
                for module, rows in pair.parts(base)
            ]
    for name in own:
        _stored(file, file.tensors[name], 1.0, dtype, sums, report)
        progress(file.tensors[name].size)
    parts.sort(key=lambda part: (part.pair.key.layer, part.module.id, part.pair.order[-1]))
    return Values(parts, _warnings(sums, parts, dtype, changes=bool(own)) if pairs or own else [])


def _scale(pair: Pair, config: AdapterConfig) -> float:
    if not pair.a.shape or not pair.a.shape[0]:
        return 1.0
    return float(np.float32(config.scale_of(pair.key.name, pair.trained_rank)))


def _fits(pair: Pair, base: ModelConfig) -> bool:
    a, b = pair.a.shape, pair.b.shape
    features = pair.features(base)
    if features is None or len(a) != 2 or len(b) != 2:
        return False
    return a[0] == b[1] and b[0] == sum(out for _, out in features)


def _stored(
    file: TensorFile, tensor: Tensor, scale: float, dtype: Dtype, sums: _RowSums, report: Grouping
) -> Array | None:
    """Return a tensor as the bundle will hold it; None where it cannot be read or stored."""
    if tensor.dtype not in READABLE or not tensor.size:
        return None
    stored = np.empty(tensor.shape, NUMPY_TYPES[dtype])
    flat, done, bad, biggest, overflow, worst = stored.reshape(-1), 0, 0, 0.0, False, 0.0
    for values in file.pieces(tensor.name, PIECE_ELEMENTS):
        piece, bits = cast(values, dtype, scale), magnitudes(values)
        flat[done : done + piece.size] = piece
        done += piece.size
        if (largest := bits.max()) >= INFINITY[values.dtype]:
            bad += int(np.count_nonzero(bits >= INFINITY[values.dtype]))
        if bad:
            continue
        biggest = max(biggest, float(largest.view(values.dtype)))
        stored_bits = bits if piece is values else magnitudes(piece)
        overflow |= bool(stored_bits.max() >= INFINITY[piece.dtype])
        if not overflow:
            nonzero = int(np.count_nonzero(bits)) if scale else 0
            sums.nonzero += nonzero
            sums.flushed += nonzero - int(np.count_nonzero(stored_bits))
            if _narrows(values.dtype, dtype, scale):
                scaled = values.astype(np.float32) * np.float32(scale)
                worst = max(worst, _worst(scaled, piece.astype(np.float32)))
    if bad:
        found = f"{bad} of {done} NaN or infinite in the first of them"
        fix = "Training diverged: use an earlier checkpoint."
        report.add("E_NAN", tensor.name, expected="finite values", found=found, fix=fix)
        return None
    if overflow:
        report.add(
            "E_OVERFLOW",
            tensor.name,
            expected=f"at most {_largest(dtype):.3e} in {dtype}",
            found=f"{biggest * scale:.3e}, scale included",
            fix="Build with lora dtype bfloat16." if dtype is Dtype.FLOAT16 else "Training diverged.",
        )
        return None
    if worst:
        sums.narrowed[f"{READABLE[tensor.dtype]}{'' if scale == 1 else ' with its scale'}"] += 1
        sums.worst = max(sums.worst, worst)
    return stored


def _narrows(kind: np.dtype[Any], dtype: Dtype, scale: float) -> bool:
    """Return True where storing rounds: in a narrower type, or with a scale that is not a power of two."""
    if dtype is Dtype.FLOAT32:
        return False
    return kind != NUMPY_TYPES[dtype] or abs(math.frexp(scale)[0]) != 0.5


def magnitudes(values: Array) -> Array:
    """Return the bits of absolute values: integers that are ordered as the values are, and quick to look at."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    bits: Array = values.view(unsigned) & ~sign
    return bits


def _worst(scaled: Array, stored: Array) -> float:
    """Return the largest relative error of what did not become zero."""
    nonzero = (scaled != 0) & (stored != 0)
    error = np.abs(stored[nonzero] - scaled[nonzero]) / np.abs(scaled[nonzero])
    return float(error.max(initial=0.0))


def _largest(dtype: Dtype) -> float:
    # numpy.finfo knows all of these types but bfloat16.
    return 3.3895e38 if dtype is Dtype.BFLOAT16 else float(np.finfo(NUMPY_TYPES[dtype]).max)


def _warnings(sums: _RowSums, parts: list[Part], dtype: Dtype, *, changes: bool) -> list[Finding]:
    found = []
    if sums.narrowed:
        listed = ", ".join(f"{count} {what}" for what, count in sorted(sums.narrowed.items()))
        error = f"stored as {dtype}, largest relative error {sums.worst:.1e}"
        fix = "Set lora_configuration.dtype to float32 to store every value as it is."
        where = f"{sums.narrowed.total()} tensors"
        found.append(
            Finding(code="W_NARROWED", where=where, expected=EXACT, found=f"{listed}, {error}", fix=fix)
        )
    if parts and not changes and not any(part.norms.ba for part in parts):
        zero = (
            "every lora_B" if not any(part.norms.b for part in parts) else "every product of lora_B and lora_A"
        )
        found.append(
            Finding(code="W_ZERO_B", found=f"{zero} is zero", fix="The adapter changes nothing: untrained?")
        )
    if sums.flushed > UNDERFLOW_SHARE * sums.nonzero:
        share = f"{100 * sums.flushed / sums.nonzero:.1f} % of the values become zero in {dtype}"
        found.append(Finding(code="W_UNDERFLOW", found=share, fix="Build with lora dtype bfloat16 or float32."))
    if sums.odd_scales:
        listed = ", ".join(f"{scale:.6g}" for scale in sorted(sums.odd_scales)[:5])
        expected = f"between {SCALES[0]:g} and {SCALES[1]:g}"
        found.append(Finding(code="W_ALPHA", where="alpha/r", expected=expected, found=listed))
    return found


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
    key, first_row = part.pair.key, part.pair.key.first_row(base)
    start, stop = (first_row + row for row in part.b_rows)
    for name in key.names_in(base, "weight"):
        file = None if weights is None else weights.find(name)
        if file is None or file.tensors[name].dtype not in READABLE or file.tensors[name].shape[0] < stop:
            continue
        step, total = max(1, BLOCK_ELEMENTS // part.pair.a.shape[1]), 0.0
        for first in range(start, stop, step):
            rows = file.read(name, (first, min(first + step, stop))).astype(np.float64)
            total += float(np.einsum("ij,ij->", rows, rows))
        return math.sqrt(total)
    return 0.0
