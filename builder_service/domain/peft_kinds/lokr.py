"""LoKr (arXiv 2309.14859): W = s kron(W1, W2), each of them whole or a product of two.

kron(B1 A1, B2 A2) is kron(B1, B2) kron(A1, A2); what is whole is a product with the identity on its shorter
side.
"""

from typing import Final

import numpy as np

from builder_service.domain.derived import Product
from builder_service.domain.peft_kinds.kind import (
    Features,
    Pairs,
    Parts,
    PeftKind,
    Side,
    Sides,
    are_products,
    itself,
)
from loramux_shared.bundle.npy import Array

FACTORS: Final = ("lokr_w1", "lokr_w2")


def _make(parts: Parts, _: Features) -> Sides | None:
    factors = [_factor(parts, name) for name in FACTORS]
    if None in factors:
        return None
    (b1, a1), (b2, a2) = (factor for factor in factors if factor is not None)
    return _kron(a1, a2), _kron(b1, b2)


def _factor(parts: Parts, name: str) -> tuple[Side, Side] | None:
    """Return B and A of a factor."""
    whole = parts.get(name)
    if whole is None:
        b, a = parts[f"{name}_a"], parts[f"{name}_b"]
        if not are_products((b, a)):
            return None
        return itself(b), itself(a)
    if len(whole.shape) != 2:
        return None
    out, inside = whole.shape
    rank = min(out, inside)
    one = Side((rank, rank), Product((), lambda: np.eye(rank, dtype=np.float32)))
    return (one, itself(whole)) if out <= inside else (itself(whole), one)


def _kron(first: Side, second: Side) -> Side:
    count = len(first.product.sources)

    def make(*wholes: Array) -> Array:
        return np.kron(first.product.make(*wholes[:count]), second.product.make(*wholes[count:]))

    shape = (first.shape[0] * second.shape[0], first.shape[1] * second.shape[1])
    return Side(shape, Product((*first.product.sources, *second.product.sources), make))


def _required_names(parts: Parts) -> list[str]:
    return [
        name
        for factor in FACTORS
        for name in ((factor,) if factor in parts else (f"{factor}_a", f"{factor}_b"))
    ]


def _trained_rank(parts: Parts) -> int:
    return next((parts[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in parts), 0)


LOKR: Final = PeftKind(
    "LOKR",
    own_fields=(
        *("alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d"),
        *("decompose_both", "decompose_factor", "init_weights"),
    ),
    default_rank=8,
    lora_fields=lambda fields: {"lora_alpha": fields.get("alpha", 8)},
    pairs=Pairs(
        tuple(f"{factor}{end}" for factor in FACTORS for end in ("", "_a", "_b")),
        _make,
        required=_required_names,
        trained_rank=_trained_rank,
    ),
)
