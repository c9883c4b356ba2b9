"""Answers that hold NaN or infinity: why they end, and when their adapter is refused."""

from __future__ import annotations

from typing import Final

import structlog

from inference_service.core.adapter import Adapter
from inference_service.core.sequence import Sequence
from loramux_shared.faults import ModelUnusable, NumericsFault

MOST: Final = 3
WITHIN_S: Final = 60.0
"""Period in which so many such answers make an adapter refused."""

log = structlog.get_logger()


def overflowed(seq: Sequence, now_s: float) -> NumericsFault:
    """Return why a sequence ends whose logits or vector are no numbers, and count that for its adapter.

    A blend counts for none of its adapters, since the request has chosen their weights; nor does the warm-up,
    which has no model's name.
    """
    adapter = seq.adapter
    digest = "" if adapter is None else adapter.digest[:12]
    log.warning("answer failed: it holds NaN or infinity", model=seq.model, digest=digest, request=seq.id)
    if isinstance(adapter, Adapter) and seq.model:
        _count(adapter, seq.model, now_s)
    if adapter is None:
        return NumericsFault(
            "the base computed NaN or infinity. Serve it in a type that holds its values (LORAMUX_DTYPE)."
        )
    return NumericsFault(
        "the adapter made NaN or infinity of the base's values: its weights overflow. Replace it by an earlier "
        "checkpoint, or ask another model."
    )


def _count(adapter: Adapter, model: str, now_s: float) -> None:
    adapter.overflows_s = (*(at for at in adapter.overflows_s if now_s - at < WITHIN_S), now_s)
    if len(adapter.overflows_s) < MOST or adapter.unusable is not None:
        return
    adapter.unusable = ModelUnusable(
        f"{MOST} of its answers within {WITHIN_S:g} s held NaN or infinity, so this replica refuses the "
        f"version {adapter.digest[:12]}. Push or load another version under this name."
    )
    log.error(
        "adapter is refused from now on: its answers hold NaN or infinity",
        model=model,
        digest=adapter.digest[:12],
        reason=adapter.unusable.reason,
    )
