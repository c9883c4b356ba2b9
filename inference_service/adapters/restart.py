"""Whether a running replica can take a generation over, or has to be started again for it."""

from __future__ import annotations

from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Merge


def needs_restart(old: Generation, new: Generation) -> str | None:
    """Return why a replica that was started with one generation cannot serve another; None where it can.

    old is the generation of the start: what was sized and loaded then stays. Names, their versions and what
    is served of them may differ.
    """
    if new.base.files != old.base.files:
        return f"another base: {new.base.source.shown} instead of {old.base.source.shown}"
    if new.max_seq_len != old.max_seq_len:
        return f"another max_seq_len: {_shown(new.max_seq_len)} instead of {_shown(old.max_seq_len)}"
    if new.max_lora_rank > old.max_lora_rank:
        return f"a larger max_lora_rank: {new.max_lora_rank} instead of {old.max_lora_rank}"
    if new.quantization is not old.quantization:
        return f"weights rounded to {new.quantization} instead of {old.quantization}"
    return _merging(old, new)


def _merging(old: Generation, new: Generation) -> str | None:
    """An adapter that is part of the weights cannot leave them; one that could be is as right beside them."""
    if old.merged is None:
        return "its adapter is to be merged into the weights" if new.merge is Merge.ALWAYS else None
    digest = old.adapters[old.merged].digest
    if new.merged != old.merged or new.adapters[old.merged].digest != digest:
        return f"adapter {old.merged} is merged into the weights, and is to be replaced or joined by others"
    return None


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
