"""The kinds of PEFT's adapters that are served, and their configs in the words of LoRA's."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from builder_service.domain.peft_kinds.adalora import ADALORA
from builder_service.domain.peft_kinds.ia3 import IA3
from builder_service.domain.peft_kinds.kind import PeftKind
from builder_service.domain.peft_kinds.loha import LOHA
from builder_service.domain.peft_kinds.lokr import LOKR
from builder_service.domain.peft_kinds.lora import LORA
from builder_service.domain.peft_kinds.miss import MISS
from builder_service.domain.peft_kinds.trainable_tokens import TRAINABLE_TOKENS
from builder_service.domain.peft_kinds.vera import VERA
from loramux_shared.ports import registered

KINDS: Final = (LORA, ADALORA, VERA, LOHA, LOKR, IA3, MISS, TRAINABLE_TOKENS)


@cache
def load_kinds() -> Mapping[str, PeftKind]:
    """Return the kinds by their ``peft_type``; those of third parties come last.

    Raises:
        SettingsInvalid: one that a package registers cannot be used.
    """
    return {each.peft_type: each for each in (*KINDS, *registered("adapter_kind", PeftKind).values())}


def kind_of(fields: Mapping[str, Any]) -> PeftKind | None:
    """Return the kind that a config says; None where it is none of these."""
    peft_type = fields.get("peft_type")
    kind = load_kinds().get(peft_type) if isinstance(peft_type, str) else None
    return kind and (kind.variant(fields) or kind)


def as_lora(kind: PeftKind, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a config of LoRA would have; what cannot be meant is left for others to find."""
    if kind is LORA:
        return fields
    left = (*kind.own_fields, "use_dora", "lora_bias")  # these fields are refused beside the kind
    plain = {key: value for key, value in fields.items() if key not in left}
    plain["r"] = kind.default_rank if (rank := plain.get("r")) is None else rank
    return plain | dict(kind.lora_fields(fields))
