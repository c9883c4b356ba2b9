"""Parameters that hold a matrix of each expert, as PEFT adapts them (``target_parameters``).

Their lora_A [experts * rank, in] has the experts' rows one after the other, and lora_B [out, rank * experts]
their columns in turns. Older releases took a parameter [experts, out, in] by position, so that A and B are each
other's transposed; shapes tell, and where they do not, it is as PEFT reads it today. Where two parameters of a
module are adapted, the wrapper of the first is within that of the second.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from builder_service.domain.derived import Derived
from builder_service.domain.grouping import Grouping
from builder_service.domain.pairs import Pair
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import INNER, LoraKey
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.layers import ExpertsLayer
from loramux_shared.bundle.modules import EXPERTS, FUSED_OF_EXPERTS
from loramux_shared.bundle.npy import Array


@dataclass(frozen=True)
class View:
    """One expert's matrix of a tensor that holds those of all."""

    source: str
    of_rows: bool
    """True if each expert has consecutive rows; False if its columns are interleaved with the others'."""
    expert: int
    num: int
    transposed: bool
    in_turns: bool
    """True if rows of gate and up are interleaved, and are to be consecutive."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensor."""
        return (self.source,)

    def of(self, *wholes: Array) -> Array:
        """Return the matrix."""
        (whole,) = wholes
        rank = len(whole) // self.num
        rows = slice(self.expert * rank, (self.expert + 1) * rank)
        part = whole[rows] if self.of_rows else whole[:, self.expert :: self.num]
        part = part.T if self.transposed else part
        return np.ascontiguousarray(np.concatenate([part[0::2], part[1::2]]) if self.in_turns else part)


def parameters_of(keys: Mapping[str, LoraKey], targeted: tuple[str, ...]) -> dict[str, LoraKey] | None:
    """Return what wrappers of a layer adapt, by their paths; None where the config names others.

    Args:
        keys: of each wrapper that has tensors, its key.
        targeted: ``target_parameters`` of the config: whole names, or ends of names.
    """
    module = next(iter(keys.values())).name.removesuffix(".base_layer")
    names = [f"{module}.{path.rpartition('.')[2]}" for path in FUSED_OF_EXPERTS]
    chosen = [
        (path, name)
        for path, name in zip(FUSED_OF_EXPERTS, names, strict=True)
        if any(name == target or name.endswith(f".{target}") for target in targeted)
    ]
    wrappers = [INNER, EXPERTS][-len(chosen) :] if chosen else []
    if set(wrappers) != set(keys):
        return None
    return {
        wrapper: replace(keys[wrapper], path=path, name=name, of_parameter=True)
        for wrapper, (path, name) in zip(wrappers, chosen, strict=True)
    }


def unstack(
    key: LoraKey, a: Tensor, b: Tensor, spec: ExpertsLayer, base: ModelConfig
) -> Iterator[tuple[LoraKey, Tensor, Tensor, tuple[View, View]]]:
    """Yield key, A and B of each expert, and how they are read; a is [experts * rank, ...]."""
    rank, num = a.shape[0] // spec.num, spec.num
    features = [base.features(module.name, key.layer) for module in key.modules]
    there = [each for each in features if each is not None]
    inside, out = there[0][0], sum(each[1] for each in there)
    by_position = (a.shape[1], b.shape[0]) == (out, inside) and (spec.transposed or out != inside)
    first, second = (b, a) if by_position else (a, b)
    turns = spec.in_turns and len(key.modules) > 1
    width, height = (b.shape[0], a.shape[1]) if by_position else (a.shape[1], b.shape[0])
    for expert in range(num):
        views = (
            View(first.name, first is a, expert, num, by_position, False),
            View(second.name, second is a, expert, num, by_position, turns),
        )
        shapes = (rank, width), (height, rank)
        own_a, own_b = (
            Tensor(
                f"{key.name}.lora_{side} of expert {expert}",
                source.dtype,
                shape,
                0,
                shape[0] * shape[1] * (READABLE[source.dtype].itemsize if source.dtype in READABLE else 0),
            )
            for side, source, shape in zip("AB", (first, second), shapes, strict=True)
        )
        yield replace(key, expert=expert), own_a, own_b, views


MERGE: Final = "Merge it into the base (merge_and_unload) and serve a full model."


def unstack_tensors(
    file: TensorFile, pairs: list[Pair], base: ModelConfig, parameters: tuple[str, ...], report: Grouping
) -> tuple[TensorFile, list[Pair]]:
    """Return pairs of single experts for those of all, and the file to read them from."""
    of_layers: dict[int, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        if pair.key.holds_all:
            of_layers[pair.key.layer][pair.key.path] = pair
    if parameters and not of_layers:
        report.add(
            "E_TARGET_PARAMS",
            "adapter_config.json: target_parameters",
            expected="tensors of experts that the base has; without experts, target_modules alone",
            found=f"{', '.join(parameters)}, but no such tensors",
            fix=MERGE,
        )
    found = [pair for pair in pairs if not pair.key.holds_all]
    tensors = dict(file.tensors)
    views: dict[str, View] = {}
    for layer, own in of_layers.items():
        spec = base.layers[layer].mlp if layer < len(base.layers) else None
        keys = parameters_of({path: pair.key for path, pair in own.items()}, parameters)
        for path, pair in own.items():
            if not isinstance(spec, ExpertsLayer):
                _refuse_layer(pair, base, report)
            elif keys is None:
                _refuse_parameters(pair, parameters, report)
            elif _is_stack(pair, spec.num, report):
                for key, a, b, seen in unstack(keys[path], pair.a, pair.b, spec, base):
                    found.append(Pair(key, a, b))
                    tensors |= {a.name: a, b.name: b}
                    views |= dict(zip((a.name, b.name), seen, strict=True))
    return (Derived(file.path, tensors, file, views) if views else file), found


def _refuse_layer(pair: Pair, base: ModelConfig, report: Grouping) -> None:
    within = pair.key.layer < len(base.layers)
    report.add(
        "E_MODULE" if within else "E_LAYER",
        pair.place,
        expected="a layer with experts",
        found="one without" if within else f"a base of {len(base.layers)} layers",
        fix="The adapter was trained on another base.",
    )


def _refuse_parameters(pair: Pair, parameters: tuple[str, ...], report: Grouping) -> None:
    report.add(
        "E_TARGET_PARAMS",
        pair.place,
        expected="tensors of those parameters of experts that target_parameters names, and of all of them",
        found=f"target_parameters {', '.join(parameters) or 'unset'}, and others in the tensors",
        fix="Correct target_parameters in adapter_config.json: it says which parameters these tensors are of.",
    )


def _is_stack(pair: Pair, num: int, report: Grouping) -> bool:
    """Return True if A has rows and B columns for so many experts; empty ones are reported elsewhere."""
    a, b = pair.a.shape, pair.b.shape
    if 0 in a or 0 in b:
        return False
    if len(a) == 2 and len(b) == 2 and a[0] == b[1] and a[0] % num == 0:
        return True
    report.add(
        "E_RANK_SHAPE",
        pair.place,
        cause=(pair.key.path, a, b),
        expected=f"lora_A ({num} experts * rank, in) and lora_B (out, rank * {num} experts)",
        found=f"lora_A {a} and lora_B {b}",
        fix="The adapter was trained on a base with another number of experts.",
    )
    return False
