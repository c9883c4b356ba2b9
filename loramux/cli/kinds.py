"""The kinds of an adapter, in words for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from loramux_shared.bundle.kinds import AdapterKind
from loramux_shared.wording import listed

_NAMES: Final = {
    AdapterKind.LORA: "LoRA",
    AdapterKind.ADALORA: "AdaLoRA",
    AdapterKind.VERA: "VeRA",
    AdapterKind.LOHA: "LoHa",
    AdapterKind.LOKR: "LoKr",
    AdapterKind.DORA: "DoRA",
    AdapterKind.IA3: "IA3",
}


def kind(kinds: Sequence[str], replaced_rows: Mapping[str, int] | None = None, num_labels: int = 0) -> str:
    """Return kinds in one line, with how many rows are replaced and labels scored: ``LoRA, head (12 rows)``.

    One that is not known here, of a newer service, is told as it is.
    """
    counts = {each: f" ({count} rows)" for each, count in (replaced_rows or {}).items()}
    if num_labels:
        counts[AdapterKind.CLASSIFIER] = f" ({num_labels} label{'s'[: num_labels != 1]})"
    words = {each: _NAMES.get(AdapterKind(each), each) if each in set(AdapterKind) else each for each in kinds}
    return ", ".join(word + counts.get(each, "") for each, word in words.items())


def task(kinds: Sequence[str], labels: Sequence[str] = (), problem_type: str = "") -> str:
    """Return what an adapter is asked for that generates no text; empty of one that does."""
    if AdapterKind.CLASSIFIER in kinds:
        called = f" ({problem_type})" if problem_type else ""
        return f"scores texts, and generates none{called}: {listed(labels)}"
    return "makes vectors of texts, and generates none" if AdapterKind.ENCODER in kinds else ""
