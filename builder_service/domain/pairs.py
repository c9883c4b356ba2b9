"""A and B of a module, and what stands beside them, as they stand in an adapter's file."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from builder_service.domain.safetensors_header import Tensor
from builder_service.domain.tensor_names import LoraKey
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.modules import Module

UP: Final = "mlp.up_proj"
DOWN: Final = "mlp.down_proj"


@dataclass(frozen=True)
class Pair:
    """A and B of one module of a layer, or of several that are fused."""

    key: LoraKey
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    """DoRA's."""
    lora_bias: Tensor | None = None
    """Bias of lora_B."""
    bias: Tensor | None = None
    """The base's own, trained."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it has."""
        every = self.a, self.b, self.magnitude, self.lora_bias, self.bias
        return tuple(tensor for tensor in every if tensor is not None)

    @property
    def place(self) -> str:
        """The pair in words."""
        return self.key.place

    @property
    def trained_rank(self) -> int:
        """The rank that the config speaks of; 0 where the tensors do not show it."""
        if self.a.trained is not None:
            return self.a.trained
        return self.a.shape[0] if self.a.shape else 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Return the key by which pairs are sorted."""
        expert = -1 if self.key.expert is None else self.key.expert
        return self.key.layer, self.key.modules[0].id, expert

    def features(self, base: ModelConfig) -> list[tuple[int, int]] | None:
        """Return (in, out) of each of its modules; None where the base has no such place."""
        return features_of(self.key, base)

    def parts(self, base: ModelConfig) -> Iterator[tuple[Module, tuple[int, int]]]:
        """Yield each module with the rows of B that are its own."""
        return parts_of(self.key, base)


@dataclass(frozen=True)
class Lone:
    """A trained bias of the base, or a scale, of a module without A and B."""

    key: LoraKey
    vector: Tensor

    @property
    def is_scale(self) -> bool:
        """Return True for a scale of IA3."""
        return self.key.side == "scale"

    @property
    def scales_input(self) -> bool:
        """Return True if it scales the module's input.

        PEFT saves that as a row, and other scales as a column.
        """
        return self.is_scale and self.vector.shape[:1] == (1,)

    @property
    def changed(self) -> LoraKey:
        """The key of the module whose output it changes: down_proj reads up_proj's, times gate_proj's."""
        return replace(self.key, path=UP) if self.scales_input else self.key


def features_of(key: LoraKey, base: ModelConfig) -> list[tuple[int, int]] | None:
    """Return (in, out) of each module of a key; None where the base has no such place."""
    found = [base.features(module.name, key.layer) for module in key.modules]
    there = [each for each in found if each is not None]
    return there if len(there) == len(found) else None


def parts_of(key: LoraKey, base: ModelConfig) -> Iterator[tuple[Module, tuple[int, int]]]:
    """Yield each module of a key with the rows of its output that are its own."""
    start = 0
    for module, (_, out) in zip(key.modules, features_of(key, base) or (), strict=True):
        yield module, (start, start + out)
        start += out
