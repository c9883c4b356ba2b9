"""The comparison of the base that an adapter names with the base that it will run on.

Its shapes are the proof.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from builder_service.domain.strict_json import shown
from loramux_shared.adapter_files import CONFIG
from loramux_shared.bundle.generation import Descent
from loramux_shared.faults import Finding

_FORMAT: Final = re.compile(
    r"bnb|[2-8]bit|int[48]|fp[48]|bf16|fp16|nvfp4|mxfp4|(quantized\.)?w[48]a(16|8)|q[2-8]_(k(_[sml])?|[01])"
    r"|awq|gptq|gguf|mlx|exl[23]|hqq|autoround|dwq"
)
"""Suffix of the name of a copy of a base, after a hyphen: the format of its weights."""
_MANNER: Final = re.compile(r"unsloth|ud|dynamic|static|block|channel|g(32|64|128)")
"""Words that may stand beside the format."""
QUANTIZED: Final = "quantized"
_WORDS: Final = {
    "finetune": "a finetune of",
    "merge": "a merge of",
    "adapter": "an adapter of",
    QUANTIZED: "a quantised copy of",
    "": "derived from",
}
"""Relations of the hub, in words."""


def base_warning(named: str, base: str, lineage: Sequence[Descent] = ()) -> Finding | None:
    """Return a warning when an adapter names another base than the one it will run on; its shapes fit.

    Args:
        named: what the adapter says.
        base: the deployment's.
        lineage: what the hub says that either was made from.
    """
    if named and _copies(named, lineage) & _copies(base, lineage):
        return None
    found, fix = shown(named) or "no name", "Its shapes fit. Make sure that it was trained on this base."
    for descent in lineage:
        found += f"; {descent.model} is {_WORDS[descent.relation]} {descent.parent}, as the hub says"
    return Finding(
        code="W_BASE", where=f"{CONFIG}: base_model_name_or_path", expected=base, found=found, fix=fix
    )


def plain_name(name: str) -> str:
    """Return the last part of a repository or path, without what copies in another format add."""
    words = name.rstrip("/").rpartition("/")[2].lower().split("-")
    end = len(words)
    while end > 1 and (_FORMAT.fullmatch(words[end - 1]) or _MANNER.fullmatch(words[end - 1])):
        end -= 1
    copied = any(map(_FORMAT.fullmatch, words[end:]))
    return "-".join(words[:end] if copied else words)


def _copies(name: str, lineage: Sequence[Descent]) -> set[str]:
    """Return the plain names of a model and of those that it is a quantised copy of."""
    names = {plain_name(name)}
    for _ in lineage:  # each adds one at most
        names |= {
            plain_name(each.parent)
            for each in lineage
            if each.relation == QUANTIZED and plain_name(each.model) in names
        }
    return names
