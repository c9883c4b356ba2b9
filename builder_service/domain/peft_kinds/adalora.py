"""AdaLoRA (arXiv 2303.10512): W = s B (E * A), E a singular value for each row of A."""

import re
from typing import Any, Final

import numpy as np

from builder_service.domain.derived import Product
from builder_service.domain.peft_kinds.kind import (
    QUERY_VALUE,
    Features,
    Fields,
    Pairs,
    Parts,
    PeftKind,
    Side,
    Sides,
    itself,
)

PARTS: Final = ("lora_A", "lora_B", "lora_E")
DEFAULT_RANK: Final = 12
_NO_DEFAULT: Final = ("mistral", "mixtral", "phi", "stablelm", "xlm-roberta")
_SINGULAR: Final = re.compile(r"\.lora_E(\.[^.]+)?$")


def _lora_fields(fields: Fields) -> Fields:
    rank = fields.get("init_r", DEFAULT_RANK)
    return {"r": rank, "rank_pattern": _ranks_left(fields.get("rank_pattern"))}


def _ranks_left(pattern: Any) -> Any:
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


def _scale(alpha: float, rank: int, first: int | None, _rs: bool) -> float:
    """Return alpha divided by the first rank, whatever is left of it, plus 1e-5.

    An alpha that is not above 0 means the rank that the module has.
    """
    return (alpha if alpha > 0 else rank) / float(np.float32(first or DEFAULT_RANK) + np.float32(1e-5))


def _make(parts: Parts, _: Features) -> Sides | None:
    a, b, e = (parts[name] for name in PARTS)
    if not (len(a.shape) == len(b.shape) == 2 and e.shape == (a.shape[0], 1) and b.shape[1] == a.shape[0]):
        return None
    return Side((a.shape[0], a.shape[1]), Product((a.name, e.name), lambda a, e: a * e)), itself(b)


ADALORA: Final = PeftKind(
    "ADALORA",
    own_fields=(
        *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        "init_lora_weights",  # the singular values are separate tensors, and start as zeros whatever it says
        "alpha_pattern",  # PEFT gives every module the same alpha
    ),
    default_rank=DEFAULT_RANK,
    lora_fields=_lora_fields,
    scale=_scale,
    targets={
        **{name: targets for name, targets in QUERY_VALUE.items() if name not in _NO_DEFAULT},
        "roberta": ("query", "key", "value", "dense"),
        "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    },
    pairs=Pairs(PARTS, _make, may_be_empty=True),
)
