"""The kinds of PEFT's adapters that amount to LoRA, and their configs in the words of LoRA's.

What they compute is read in PEFT's layers; papers: AdaLoRA 2303.10512, VeRA 2310.11454, LoHa 2108.06098,
LoKr 2309.14859, and IA3 2205.05638, which has scales of outputs and no A and B.
"""

import math
import re
from enum import StrEnum
from typing import Any, Final

import numpy as np


class Kind(StrEnum):
    """A ``peft_type`` that rows can be made of."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    VERA = "VERA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    IA3 = "IA3"


# Fields that LoRA does not have: how an adapter of the kind was trained, or used below.
_OWN: Final = {
    Kind.LORA: (),
    Kind.ADALORA: (
        "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    ),
    Kind.VERA: ("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"),
    Kind.IA3: ("feedforward_modules", "init_ia3_weights"),
    Kind.LOHA: ("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
    Kind.LOKR: (
        "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d",
        "decompose_both", "decompose_factor", "init_weights",
    ),
}  # fmt: skip
_SINGULAR: Final = re.compile(r"\.lora_E(\.[^.]+)?$")
DEFAULT_RANKS: Final = {Kind.ADALORA: 12, Kind.VERA: 256, Kind.LOHA: 8, Kind.LOKR: 8}
"""PEFT's own."""


def kind_of(fields: dict[str, Any]) -> Kind | None:
    """Return the kind that a config says; None where it is none of these."""
    peft_type = fields.get("peft_type")
    return Kind(peft_type) if isinstance(peft_type, str) and peft_type in set(Kind) else None


def as_lora(kind: Kind, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a config of LoRA would have; what cannot be meant is left for others to find."""
    if kind is Kind.LORA:
        return fields
    left = (*_OWN[kind], "use_dora", "lora_bias")  # these fields are refused beside the kind
    plain = {key: value for key, value in fields.items() if key not in left}
    plain["r"] = DEFAULT_RANKS.get(kind, 1) if (rank := plain.get("r")) is None else rank
    if kind is Kind.ADALORA:
        plain["r"] = fields.get("init_r", DEFAULT_RANKS[kind])
        plain["rank_pattern"] = _allocated(fields.get("rank_pattern"))
        # The singular values are separate tensors, and start as zeros whatever this field says.
        plain.pop("init_lora_weights", None)
        plain.pop("alpha_pattern", None)  # PEFT gives every module the same alpha
    elif kind in (Kind.VERA, Kind.IA3):
        plain.pop("lora_alpha", None)
    else:
        plain["lora_alpha"] = fields.get("alpha", 8)
    return plain


def _allocated(pattern: Any) -> Any:
    """Return the ranks that AdaLoRA left to modules: of each it lists which singular values stay."""
    if not isinstance(pattern, dict):
        return pattern
    ranks = {}
    for name, value in pattern.items():
        flags = value if isinstance(value, list) and all(isinstance(flag, bool) for flag in value) else None
        rank = value if flags is None else sum(flags)
        if flags is None or rank:
            ranks[_SINGULAR.sub("", name)] = rank
    return ranks


def scale(kind: Kind, alpha: float, rank: int, first: int | None, *, rs: bool) -> float:
    """Return what B A is multiplied by.

    Args:
        kind: of the adapter.
        alpha: of the module.
        rank: of the module, as it was trained.
        first: the rank that modules began with. AdaLoRA divides by it whatever it left, and adds 1e-5; an
            alpha that is not above 0 means to it the rank that the module has.
        rs: whether it is rsLoRA.
    """
    match kind:
        case Kind.VERA:
            return 1.0
        case Kind.ADALORA:
            return (alpha if alpha > 0 else rank) / float(
                np.float32(first or DEFAULT_RANKS[kind]) + np.float32(1e-5)
            )
        case _:
            return alpha / (math.sqrt(rank) if rs else rank)
