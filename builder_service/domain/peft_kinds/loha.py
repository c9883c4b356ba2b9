"""LoHa (arXiv 2108.06098): W = s (B1 A1) * (B2 A2), element by element.

Its rank is at most r * r: rows of A are all products of a row of A1 and one of A2, columns of B likewise.
"""

from typing import Final

from builder_service.domain.derived import Product
from builder_service.domain.peft_kinds.kind import Features, Pairs, Parts, PeftKind, Side, Sides, are_products

PARTS: Final = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _make(parts: Parts, _: Features) -> Sides | None:
    b1, a1, b2, a2 = (parts[name] for name in PARTS)
    if not are_products((b1, a1), (b2, a2)) or (b1.shape[0], a1.shape[1]) != (b2.shape[0], a2.shape[1]):
        return None
    rank, (out, inside) = a1.shape[0] * a2.shape[0], (b1.shape[0], a1.shape[1])
    return (
        Side(
            (rank, inside), Product((a1.name, a2.name), lambda x, y: (x[:, None] * y[None]).reshape(rank, -1))
        ),
        Side(
            (out, rank), Product((b1.name, b2.name), lambda x, y: (x[:, :, None] * y[:, None]).reshape(out, -1))
        ),
    )


LOHA: Final = PeftKind(
    "LOHA",
    own_fields=("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"),
    default_rank=8,
    lora_fields=lambda fields: {"lora_alpha": fields.get("alpha", 8)},
    pairs=Pairs(PARTS, _make, trained_rank=lambda parts: parts["hada_w1_b"].shape[0]),
)
