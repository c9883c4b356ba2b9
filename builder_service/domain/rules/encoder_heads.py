"""The score heads of encoders: a linear behind at most a dense layer and a norm; an adapter may have any part.

PEFT saves the layers that ``modules_to_save`` names whole, and trains LoRA on those that ``target_modules``
names; the others are the base's. A bundle has the weights that result.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.config_fields import FILE
from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.grouping import Grouping
from builder_service.domain.rules.config import CLASSIFIES, ENCODES, INVOCATION, TAGS
from builder_service.domain.rules.vectors import report_left_out
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.score_heads import SAVED, PlannedScore
from loramux_shared.bases.families.encoders import POOLER, EncoderConfig, HeadLayers
from loramux_shared.bundle.manifest import MAX_LABELS
from loramux_shared.bundle.npy import Array

_KEY: Final = re.compile(
    r"base_model\.model\.(?P<module>(?:\w+\.)?pooler\.dense|head\.(?:dense|norm)|pre_classifier|classifier(?:\.dense|\.out_proj)?)\."
    r"(?:modules_to_save\.(?:[^.]+\.)?)?(?P<what>weight|bias|(?P<lora>lora_[AB])(?:\.[^.]+)?\.weight|lora_.+)"
)
_AGAIN: Final = (
    "Save the adapter with the head that it was trained with: PEFT does so for task_type SEQ_CLS and TOKEN_CLS."
)
_VECTORS: Final = "Score heads of this base are not served: train for vectors."
NAME: Final = "score head"
"""The name of the tensor that is made; no key of an adapter is so called."""


@dataclass(frozen=True)
class TakenHead:
    """A file without the tensors of a head, and what these are."""

    file: TensorFile
    score: PlannedScore | None
    """None where the adapter makes vectors, or the head was reported."""
    saved: tuple[str, ...]
    """Names in ``modules_to_save`` that are no part of the head."""
    unused: tuple[str, ...]
    """Tensors of the head of an adapter that makes vectors, which none passes."""


@dataclass(frozen=True)
class MadeHead(TensorFile):
    """A head in memory, as the one tensor of a file."""

    values: Array
    sources: tuple[str, ...]
    """Tensors of the adapter that it was made from."""

    def pieces(self, name: str, elements: int, rows: tuple[int, int] | None = None) -> Iterator[Array]:  # noqa: ARG002 - rows are short
        """Yield rows, flat."""
        yield self.values[slice(*rows) if rows else slice(None)].reshape(-1)

    def origins(self, name: str) -> tuple[str, ...]:  # noqa: ARG002 - there is one
        """Return the tensors of the adapter that the head was made from."""
        return self.sources


def take_head(
    file: TensorFile, config: AdapterConfig, base: EncoderConfig, weights: BaseTensors | None, report: Grouping
) -> TakenHead:
    """Take the tensors of a score head out of an adapter's file; report what cannot be served of an encoder."""
    if config.invocation_tokens:
        fix = f"Train without {INVOCATION}."
        expected = "unset for an encoder, whose rows see what is before the invocation and behind it"
        report.add("E_ALORA", f"{FILE}: {INVOCATION}", expected=expected, found="some", fix=fix)
    found = {name: match for name in file.tensors if (match := _KEY.fullmatch(name))}
    of_head = {
        name: match for name, match in found.items() if config.classifies or match["module"].endswith(POOLER)
    }
    rest = replace(file, tensors={name: each for name, each in file.tensors.items() if name not in of_head})
    modules = {match["module"] for match in of_head.values()}
    gone = SAVED if config.classifies else ()
    saved = tuple(
        name
        for name in config.modules_to_save
        if name not in gone and not any(f".{name}." in f".{module}." for module in modules)
    )
    if not config.classifies:
        return TakenHead(rest, None, saved, tuple(sorted(of_head)))
    task = f"task_type {TAGS if config.of_tokens else CLASSIFIES}"
    parts: dict[tuple[str, str], Tensor] = {}
    for name, match in of_head.items():
        module = POOLER if match["module"].endswith(POOLER) else match["module"]
        parts[module, match["lora"] or match["what"]] = file.tensors[name]
    layers = base.head(of_tokens=config.of_tokens)
    head = _Head(file, config, base, weights, report, parts, layers, task).made()
    return TakenHead(rest, head, saved, ())


@dataclass(frozen=True)
class _Head:
    file: TensorFile
    config: AdapterConfig
    base: EncoderConfig
    weights: BaseTensors | None
    report: Grouping
    parts: dict[tuple[str, str], Tensor]
    """Tensors of the adapter by module and role: weight, bias, lora_A or lora_B."""
    layers: HeadLayers
    task: str

    def made(self) -> PlannedScore | None:
        """Return the head as a bundle has it; None where something was reported."""
        hidden, layers = self.base.dims.hidden, self.layers
        if not layers.labels:
            found_head = f"a head of {self.base.architecture} with another activation or pooling"
            self.report.add("E_TASK", self.task, expected=ENCODES, found=found_head, fix=_VECTORS)
            return None
        served = {name: ["weight", "lora_A", "lora_B"] for name in (layers.dense, layers.labels) if name}
        served |= {layers.norm: ["weight"]} if layers.norm else {}
        for name in layers.biased:
            served[name].append("bias")
        for (module, what), tensor in self.parts.items():
            if what not in served.get(module, ()):
                expected = "; ".join(f"{', '.join(kinds)} of {name}" for name, kinds in served.items())
                self._refuse(tensor.name, expected, f"{module}.{what}")
        rows = [self._layer(layers.dense, hidden)] if layers.dense else []
        rows += [self._norm()] if layers.norm else []
        rows.append(self._layer(layers.labels, None))
        found = [each for each in rows if each is not None]
        if len(found) < len(rows) or self.report:
            return None
        values = np.concatenate(found)
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            fix = "Training diverged: use an earlier checkpoint."
            self.report.add(
                "E_NAN", layers.labels, expected="finite values", found=f"{bad} NaN or infinite", fix=fix
            )
            return None
        head = layers.score_head(len(found[-1]), self.base)
        sources = tuple(tensor.name for tensor in self.parts.values())
        tensor = Tensor(NAME, "F32", values.shape, 0, values.nbytes)
        return PlannedScore(head, MadeHead(self.file.path, {NAME: tensor}, values, sources), NAME)

    def _layer(self, module: str, out: int | None) -> Array | None:
        """Return weights and biases of a layer, [out, hidden + 1]; out is None for one row per label."""
        weight, bias = self._weight_and_bias(module)
        hidden, with_bias = self.base.dims.hidden, " and a bias" * (module in self.layers.biased)
        expected = f"{module}.weight [{out or f'1 to {MAX_LABELS} labels'}, {hidden}]{with_bias}"
        if weight is None or bias is None:
            self._refuse(self.task, expected, "none, in the adapter or in the base")
            return None
        fits = weight.ndim == 2 and weight.shape[1] == hidden and bias.shape == weight.shape[:1]
        if not fits or not (len(weight) == out if out else 1 <= len(weight) <= MAX_LABELS):
            self._refuse(module, expected, f"{list(weight.shape)} and {list(bias.shape)}")
            return None
        added = self._product(module, weight.shape)
        return None if added is None else np.concatenate([weight + added, bias[:, None]], axis=1)

    def _norm(self) -> Array | None:
        """Return weight and bias of the norm as rows of the file, [2, hidden + 1]."""
        norm, hidden = self.layers.norm, self.base.dims.hidden
        weight, bias = self._weight_and_bias(norm)
        if weight is None or bias is None or not weight.shape == bias.shape == (hidden,):
            expected = f"{norm}.weight [{hidden}]{' and a bias' * (norm in self.layers.biased)}"
            self._refuse(self.task, expected, "none of this shape, in the adapter or in the base")
            return None
        return np.pad(np.stack([weight, bias]), ((0, 0), (0, 1)))

    def _weight_and_bias(self, module: str) -> tuple[Array | None, Array | None]:
        """Return both, or zeros where the module has no bias; None where one is missing."""
        weight = self._whole(module, "weight")
        if module in self.layers.biased or weight is None:
            return weight, self._whole(module, "bias")
        return weight, np.zeros(weight.shape[:1], np.float32)

    def _whole(self, module: str, kind: str) -> Array | None:
        """Return a tensor of the adapter, or else of the base, in float32; None where neither has one."""
        file, tensor = self.file, self.parts.get((module, kind))
        name = "" if tensor is None else tensor.name
        if tensor is None and self.weights is not None:
            for name in [f"{prefix}{module}.{kind}" for prefix in self.base.names.prefixes]:
                if (there := self.weights.find(name)) is not None:
                    file, tensor = there, there.tensors[name]
                    break
        if tensor is None or tensor.dtype not in READABLE:
            return None
        values: Array = file.read(name).astype(np.float32)
        return values

    def _product(self, module: str, shape: tuple[int, ...]) -> Array | None:
        """Return what LoRA adds to a layer's weight; None where it was reported."""
        a, b = (self.parts.get((module, kind)) for kind in ("lora_A", "lora_B"))
        if a is None and b is None:
            return np.zeros(shape, np.float32)
        there = () if a is None or b is None else (b.shape[0], *a.shape[1:], *b.shape[1:])
        if a is None or b is None or there != (*shape, a.shape[0]) or {a.dtype, b.dtype} - READABLE.keys():
            found = ", ".join(f"{each.name} {list(each.shape)}" for each in (a, b) if each is not None)
            self._refuse(module, f"lora_A and lora_B of {list(shape)}", found)
            return None
        match = _KEY.fullmatch(a.name)
        name = match["module"] if match else module
        config, _ = self.config.read([name])
        if left_out := config.left_out_by(name):
            report_left_out(name, left_out, "tensors", config, self.report)
        product = self.file.read(b.name).astype(np.float64) @ self.file.read(a.name).astype(np.float64)
        added: Array = (config.scale_of(name, a.shape[0]) * product).astype(np.float32)
        return added

    def _refuse(self, place: str, expected: str, found: str) -> None:
        self.report.add("E_TASK", place, expected=expected, found=found, fix=_AGAIN)
