"""An adapter's vectors of modules beside A and B: y becomes ``c * y + d``.

DoRA (https://arxiv.org/abs/2402.09353, 4.3) is ``m / |W + sBA| * (W + sBA) x``, with the norm of each row; PEFT
leaves the base's bias as it is. A trained bias takes the place of the base's, and that of lora_B is added.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import Lone, Pair, features_of, parts_of
from builder_service.domain.rules.stacks import MERGE
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import LoraKey
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import Module
from loramux_shared.bundle.npy import NUMPY_TYPES, Array, cast
from loramux_shared.deployment import Dtype
from loramux_shared.faults import Finding

BLOCK_ELEMENTS: Final = 1 << 20
"""Elements of W whose norms are computed at once, in float64."""


@dataclass(frozen=True)
class VectorRow:
    """The vectors of a module of a layer, as a bundle has them."""

    key: LoraKey
    module: Module
    vectors: tuple[Array, ...]
    """Vectors in the storage type, [out] each.

    First c, then d where there is some, then what rounding took from c.
    """


@dataclass
class AdapterVectors:
    """The vectors of an adapter."""

    rows: dict[tuple[int, int], VectorRow] = field(default_factory=dict)
    """Vectors by layer and module id; those that change nothing are left out."""
    redundant: list[str] = field(default_factory=list)
    """Biases that are the base's own."""
    worst: float = 0.0
    """Relative error of a value of d."""
    rounded: int = 0
    """Vectors with such values."""

    def add(self, key: LoraKey, module: Module, c: Array, d: Array, dtype: Dtype) -> None:
        """Add c and d of a module, unless they change nothing."""
        if np.any(c != 1) or np.any(d != 0):
            self.rows[key.layer, module.id] = VectorRow(key, module, stored(c, d, dtype))
            self._note(d, dtype)

    def _note(self, d: Array, dtype: Dtype) -> None:
        rounded = cast(d, dtype).astype(np.float32)
        if np.any(rounded != d):
            nonzero = d != 0
            self.rounded += 1
            self.worst = max(self.worst, float((np.abs(rounded - d)[nonzero] / np.abs(d)[nonzero]).max()))

    def warnings(self, dtype: Dtype) -> list[Finding]:
        """Return what was rounded."""
        if not self.rounded:
            return []
        found = f"biases, stored as {dtype}, largest relative error {self.worst:.1e}"
        fix = "Set lora_configuration.dtype to float32 to store every value as it is."
        where = f"{self.rounded} vectors"
        expected = "values that the storage type can hold"
        return [Finding(code="W_NARROWED", where=where, expected=expected, found=found, fix=fix)]


@dataclass(frozen=True)
class VectorReader:
    """Makes the vectors of an adapter from its tensors and the base's."""

    file: TensorFile
    base: ModelConfig
    weights: BaseTensors | None
    dtype: Dtype
    report: Grouping
    progress: Callable[[int], None]
    normalised: bool
    """True if magnitudes are divided by the norms already."""

    def of_pair(self, pair: Pair, scale: float, found: AdapterVectors) -> None:
        """Add what stands beside A and B, whose product has a scale."""
        c, base_bias = np.ones(pair.b.shape[0], np.float32), self._base_bias(pair.key)
        bias = np.zeros_like(c) if base_bias is None else base_bias
        if pair.magnitude is not None:
            c = self._vector(pair.magnitude)
            norms = None if self.normalised else self._norms(pair, scale)
            c = c if norms is None else divided(c, norms)
        trained = bias if pair.bias is None else self._trained(pair.key, pair.bias, base_bias, found)
        d = trained.astype(np.float64) - c.astype(np.float64) * bias
        if pair.lora_bias is not None:
            d += scale * self._vector(pair.lora_bias).astype(np.float64)
        self._add(pair.key, c, d.astype(np.float32), found)

    def of_scales(self, lone: list[Lone], found: AdapterVectors) -> None:
        """Add the scales of IA3: of outputs; what down_proj reads is up_proj's, times gate_proj's."""
        scales: dict[tuple[int, str], tuple[LoraKey, Array]] = {}
        for each in lone:
            key, c = each.changed, self._vector(each.vector).reshape(-1)
            _, before = scales.get((key.layer, key.path), (key, np.float32(1)))
            scales[key.layer, key.path] = key, c * before
        for key, c in scales.values():
            self._add(key, c, np.zeros_like(c), found)

    def of_bias(self, lone: Lone, found: AdapterVectors) -> None:
        """Add a bias alone."""
        bias = self._base_bias(lone.key)
        trained = self._trained(lone.key, lone.vector, bias, found)
        d = np.zeros(trained.shape) if bias is None else trained.astype(np.float64) - bias
        self._add(lone.key, np.ones(d.shape, np.float32), d.astype(np.float32), found)

    def _add(self, key: LoraKey, c: Array, d: Array, found: AdapterVectors) -> None:
        for kind, expected in ((np.dtype(np.float32), "finite values"), (NUMPY_TYPES[self.dtype], "")):
            with np.errstate(over="ignore", invalid="ignore"):
                lost = not all(np.isfinite(each.astype(kind).astype(np.float32)).all() for each in (c, d))
            if lost and expected:
                fix = "Training diverged, or a row of W + BA is zero: use an earlier checkpoint."
                self.report.add("E_NAN", key.place, expected=expected, found="NaN or infinite", fix=fix)
                return
            if lost:
                fix = "Build with lora dtype bfloat16 or float32."
                most = f"values that {self.dtype} has"
                self.report.add("E_OVERFLOW", key.place, expected=most, found="larger ones", fix=fix)
                return
        for module, (start, stop) in parts_of(key, self.base):
            found.add(key, module, c[start:stop], d[start:stop], self.dtype)

    def _vector(self, tensor: Tensor) -> Array:
        self.progress(tensor.size)
        values: Array = self.file.read(tensor.name).astype(np.float32)
        return values

    def _trained(self, key: LoraKey, tensor: Tensor, bias: Array | None, found: AdapterVectors) -> Array:
        """Return a trained bias; report it where the base has none."""
        if bias is None:
            expected, fix = "none, for the base has none", "The adapter was trained on another base."
            self.report.add("E_BIAS", key.place, expected=expected, found="a trained bias", fix=fix)
        trained = self._vector(tensor)
        if bias is not None and np.array_equal(trained, bias):
            found.redundant.append(tensor.name)
        return trained

    def _base_bias(self, key: LoraKey) -> Array | None:
        """Return the bias that the base's tensors have for a module; None where they have none."""
        for name in key.names_in(self.base, "bias"):
            file = None if self.weights is None else self.weights.find(name)
            if file is None:
                continue
            kind, out = (
                file.tensors[name].dtype,
                sum(stop - start for _, (start, stop) in parts_of(key, self.base)),
            )
            shape, first = file.tensors[name].shape, key.first_row(self.base)
            packed = key.path in self.base.stored and len(shape) == 1 and first + out <= shape[0]
            if kind in READABLE and (shape == (out,) or packed):
                bias: Array = file.read(name, (first, first + out)).astype(np.float32)
                return bias
            expected = f"the base's {key.leaf}.bias of {out} values in float32, float16 or bfloat16"
            found = f"{kind} {list(shape)}"
            self.report.add("E_BIAS", key.place, cause=kind, expected=expected, found=found, fix=MERGE)
        return None

    def _norms(self, pair: Pair, scale: float) -> Array | None:
        """Return the norms of the rows of W + sBA, in float64; None where W cannot be read."""
        file, name = self._weight_of(pair.key)
        if file is None:
            return None
        a, b = self.file.read(pair.a.name).astype(np.float64), self.file.read(pair.b.name).astype(np.float64)
        norms, step = np.empty(len(b)), max(1, BLOCK_ELEMENTS // a.shape[1])
        first = pair.key.first_row(self.base)
        for start in range(0, len(b), step):
            rows = file.read(name, (first + start, first + min(start + step, len(b)))).astype(np.float64)
            rows += scale * np.dot(b[start : start + step], a)
            norms[start : start + step] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
            self.progress(0)
        return norms

    def _weight_of(self, key: LoraKey) -> tuple[TensorFile | None, str]:
        """Return the file that has the base's weight of a module, and its name; report where none has."""
        for name in key.names_in(self.base, "weight"):
            file = None if self.weights is None else self.weights.find(name)
            if file is not None and file.tensors[name].dtype in READABLE:
                return file, name
            if (file := self._widened(key, name)) is not None:
                return file, name
        quantized = "weights of few bits" if self.base.quantization is not None else "none"
        expected = f"the base's {key.leaf}.weight in float32, float16 or bfloat16"
        fix = f"Build with a base whose weights were not rounded. Or: {MERGE}"
        if self.base.quantization is not None:
            expected = "torch beside the builder, to widen the base's weights"
            fix = "Install it there: pip install 'loramux[inference]'."
        self.report.add("E_DORA", key.place, cause=quantized, expected=expected, found=quantized, fix=fix)
        return None, ""

    def _widened(self, key: LoraKey, name: str) -> TensorFile | None:
        """Return a file with a weight that the base keeps in few bits, if it does."""
        features = features_of(key, self.base)
        if self.weights is None or self.base.quantization is None or features is None:
            return None
        return self.weights.widen(name, (sum(out for _, out in features), features[0][0]))


def divided(magnitudes: Array, norms: Array) -> Array:
    """Return magnitudes [out] by norms of rows; not finite where a row is zero."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return (magnitudes.astype(np.float64) / norms).astype(np.float32)


def stored(c: Array, d: Array, dtype: Dtype) -> tuple[Array, ...]:
    """Return the fewest vectors that say c and d in a storage type."""
    first, second = cast(c, dtype), cast(d, dtype)
    rest = cast(c - first.astype(np.float32), dtype)
    if np.any(rest != 0):
        return first, second, rest
    return (first, second) if np.any(second != 0) else (first,)
