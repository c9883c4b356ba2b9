"""VeRA (arXiv 2310.11454): W = (b * B) (d * A), with A and B of all modules, cut to the size of each."""

from typing import Final

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
)
from loramux_shared.faults import Finding

SHARED: Final = ("vera_A", "vera_B")
PARTS: Final = ("vera_lambda_b", "vera_lambda_d")


def _refusals(fields: Fields) -> list[Finding]:
    if fields.get("save_projection") is not False:
        return []
    return [
        Finding(
            code="E_NOT_LORA",
            where="adapter_config.json: save_projection",
            expected="true",
            found="false: the projections are drawn from a key, as a release of torch draws",
            fix="Load it with PEFT where it was trained, set save_projection to True, and save it again.",
        )
    ]


def _make(parts: Parts, features: Features) -> Sides | None:
    a, b, out, inner = (parts[name] for name in (*SHARED, *PARTS))
    fits = len(a.shape) == len(b.shape) == 2 and len(out.shape) == len(inner.shape) == 1
    if not fits or (a.shape[0], b.shape[1]) != inner.shape * 2 or b.shape[0] < out.shape[0]:
        return None
    width, _ = features
    if a.shape[1] < width:
        return None
    rows, columns = out.shape[0], width or a.shape[1]
    return (
        Side((a.shape[0], columns), Product((a.name, inner.name), lambda a, d: a[:, :columns] * d[:, None])),
        Side((rows, b.shape[1]), Product((b.name, out.name), lambda b, scale: b[:rows] * scale[:, None])),
    )


VERA: Final = PeftKind(
    "VERA",
    own_fields=(
        *("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"),
        "lora_alpha",
    ),
    default_rank=256,
    scale=lambda *_: 1.0,
    targets={**QUERY_VALUE, "phi": ("q_proj", "v_proj")},
    refusals=_refusals,
    pairs=Pairs(PARTS, _make, shared=SHARED),
)
