"""MiSS (arXiv 2409.15371): W = B A, where A adds up every r-th input: the identity, again and again.

`mini` has the first columns of B alone, which repeat over the outputs; `bat` multiplies the base's own blocks.
"""

from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from builder_service.domain.derived import Product
from builder_service.domain.peft_kinds.kind import Features, Fields, Pairs, Parts, PeftKind, Side, Sides
from loramux_shared.faults import Finding
from loramux_shared.untrusted_json import quoted

PART: Final = "miss_block"


def _make(parts: Parts, features: Features, mini: int | None = None) -> Sides | None:
    """Return A and B; mini is the columns that a block has where these repeat."""
    block = parts[PART]
    if len(block.shape) != 2:
        return None
    rank, columns = block.shape
    inside, out = features[0] or rank, features[1] or columns
    if rank > inside or (mini is not None and (columns != mini or out % mini)):
        return None
    rows = columns if mini is None else out
    a = Product((), lambda: np.eye(rank, dtype=np.float32)[:, np.arange(inside) % rank])
    b = Product((block.name,), lambda block: np.tile(block.T, (rows // columns, 1)))
    return Side((rank, inside), a), Side((rows, rank), b)


def _variant(fields: Fields) -> PeftKind:
    """Return the kind of a config: `mini` says how many columns a block has."""
    if fields.get("init_weights") != "mini":
        return MISS
    return replace(MISS, pairs=Pairs((PART,), partial(_make, mini=fields.get("mini_r", 1))))


def _refusals(fields: Fields) -> list[Finding]:
    if (value := fields.get("init_weights", True)) in (True, False, None, "mini"):
        return []
    where, fix = (
        "adapter_config.json: init_weights",
        "Merge it (merge_and_unload), or train with init_weights True.",
    )
    found = f"{quoted(value)}, which multiplies the base's own weights"
    return [Finding(code="E_NOT_LORA", where=where, expected='true, false or "mini"', found=found, fix=fix)]


MISS: Final = PeftKind(
    "MISS",
    own_fields=("miss_dropout", "mini_r", "init_weights", "lora_alpha"),
    default_rank=64,
    scale=lambda *_: 1.0,
    refusals=_refusals,
    pairs=Pairs((PART,), _make),
    variant=_variant,
)
