"""What an adapter is, as people call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from loramux_shared.bundle.kinds import AdapterKind

_NAMES: Final = {
    AdapterKind.LORA: "LoRA",
    AdapterKind.ADALORA: "AdaLoRA",
    AdapterKind.VERA: "VeRA",
    AdapterKind.LOHA: "LoHa",
    AdapterKind.LOKR: "LoKr",
    AdapterKind.DORA: "DoRA",
    AdapterKind.IA3: "IA3",
}


def kind(kinds: Sequence[str], replaced_rows: Mapping[str, int] | None = None) -> str:
    """Return kinds in one line, with how many rows are replaced: ``LoRA, head (12 rows)``.

    One that is not known here, of a newer service, is told as it is.
    """
    rows = replaced_rows or {}
    words = {each: _NAMES.get(AdapterKind(each), each) if each in set(AdapterKind) else each for each in kinds}
    return ", ".join(f"{word} ({rows[each]} rows)" if each in rows else word for each, word in words.items())
