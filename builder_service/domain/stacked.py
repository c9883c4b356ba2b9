"""Parameters that hold a matrix of each expert, as PEFT adapts them (``target_parameters``).

Their lora_A [experts * rank, in] has the experts' rows one after the other, and lora_B [out, rank * experts]
their columns in turns. Older releases took a parameter [experts, out, in] by position, so that A and B are each
other's transposed; shapes tell, and where they do not, it is as PEFT reads it today. Where two parameters of a
module are adapted, the wrapper of the first is within that of the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from builder_service.domain.safetensors_header import READABLE, Tensor
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
    by_position = (a.shape[1], b.shape[0]) == (out, inside) != (inside, out)
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
