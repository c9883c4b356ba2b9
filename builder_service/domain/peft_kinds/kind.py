"""The type of entries of the port `adapter_kind`, and what several of them use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from builder_service.domain.derived import Product
from builder_service.domain.safetensors_header import Tensor
from loramux_shared.faults import Finding

Fields: TypeAlias = Mapping[str, Any]
"""The fields of ``adapter_config.json``."""
Parts: TypeAlias = Mapping[str, Tensor]
"""The tensors of a module by the names of its kind."""
Features: TypeAlias = tuple[int, int]
"""Inputs and outputs of a module of the base; 0 where the base has no such module."""
Targets: TypeAlias = tuple[str, ...] | str
"""Names, or a pattern."""

QUERY_VALUE: Final[Mapping[str, Targets]] = {
    **dict.fromkeys(
        ("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        ("q_proj", "v_proj"),
    ),
    "stablelm": ("q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt_neox": ("query_key_value",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
}
"""Modules that LoRA and most kinds adapt where the config names none, by ``model_type``."""


@dataclass(frozen=True)
class Side:
    """A or B of a module."""

    shape: tuple[int, int]
    product: Product


Sides: TypeAlias = tuple[Side, Side]
"""A and B."""


def lora_scale(alpha: float, rank: int, _first: int | None, rs: bool) -> float:
    """Return alpha/r, or alpha/sqrt(r) with rsLoRA."""
    return alpha / (math.sqrt(rank) if rs else rank)


@dataclass(frozen=True)
class Pairs:
    """The recipe of A and B of a module, from the tensors of its kind."""

    parts: tuple[str, ...] = ()
    """Ends of the names of a module's tensors; none where rows are made of the tensors as they are."""
    make: Callable[[Parts, Features], Sides | None] = lambda *_: None
    """Returns A and B of a module, of its tensors and its features; None for other shapes."""
    shared: tuple[str, ...] = ()
    """Tensors that all modules have in common."""
    required: Callable[[Parts], Sequence[str]] | None = None
    """Returns the tensors that must be there beside those that are; without it all must be."""
    trained_rank: Callable[[Parts], int | None] = lambda _: None
    """Returns the rank that the config speaks of; 0 where the tensors do not show it, None where it is A's."""
    may_be_empty: bool = False
    """True if a module whose tensors have no elements is not adapted."""


@dataclass(frozen=True)
class PeftKind:
    """A kind of adapters that rows can be made of."""

    peft_type: str
    own_fields: tuple[str, ...] = ()
    """Fields that have no meaning for LoRA, or another one."""
    default_rank: int = 1
    """PEFT's own."""
    lora_fields: Callable[[Fields], Fields] = lambda _: {}
    """Returns the fields of LoRA that follow from the config's."""
    scale: Callable[[float, int, int | None, bool], float] = lora_scale
    """Returns what B A is multiplied by: of the alpha and the trained rank of a module, the rank of the config,
    and whether it is rsLoRA."""
    targets: Mapping[str, Targets] = field(default_factory=lambda: QUERY_VALUE)
    """Modules that PEFT adapts where the config names none, by ``model_type``."""
    refusals: Callable[[Fields], list[Finding]] = lambda _: []
    """Returns findings about what the config asks for and cannot be served."""
    pairs: Pairs = Pairs()
    """How A and B are made."""
    variant: Callable[[Fields], PeftKind | None] = lambda _: None
    """Returns the kind that takes its place for a config; None: there is none."""
    mark: str = ""
    """A part of the names of tensors that no other kind has, where no pairs are made."""


def are_products(*pairs: tuple[Tensor, Tensor]) -> bool:
    """Return True if the second of each pair can be multiplied by the first."""
    return all(len(b.shape) == len(a.shape) == 2 and b.shape[1] == a.shape[0] for b, a in pairs)


def itself(tensor: Tensor) -> Side:
    """Return a matrix of the file as A or B."""
    rows, columns = tensor.shape
    return Side((rows, columns), Product((tensor.name,), lambda whole: whole))
