"""Warnings about an adapter's origin: the name of its base, and the licences of both."""

import re
from typing import Final

from loramux_shared.adapter_files import CONFIG
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.faults import Finding
from loramux_shared.sources.licence import OTHER, README
from loramux_shared.untrusted_json import excerpt


def origin_warnings(named: str, licence: str, base: BaseRecord) -> list[Finding]:
    """Return the warnings about the base and the licence that an adapter names."""
    found = (base_warning(named, base.source.label), licence_warning(licence, base.licence))
    return [finding for finding in found if finding is not None]


def licence_warning(adapter: str, base: str) -> Finding | None:
    """Return a warning where an adapter and its base have different licences, or only one says which.

    Whether one allows the other is for people to say.
    """
    if not adapter and not base:
        return None
    known = not any(
        licence.casefold() in ("", OTHER) or licence.startswith("see ") for licence in (adapter, base)
    )
    if known and adapter.casefold() == base.casefold():
        return None
    return Finding(
        code="W_LICENSE",
        where=f"{README}: license",
        expected=f"{base or 'none'}, as the base",
        found=adapter or "none",
        fix="Check that both licences allow your use.",
    )


_FORMAT: Final = re.compile(
    r"bnb|[2-8]bit|int[48]|fp[48]|b?f16|fp16|f32|nvfp4|mxfp4|(quantized\.)?w[48]a(16|8)|i?q[2-8]_(k(_(s|m|l|xl))?|[01]|nl|xs)"
    r"|awq|gptq|gguf|mlx|exl[23]|hqq|autoround|dwq"
)
"""Suffix of the name of a copy of a base, after a hyphen: the format of its weights."""
_FILE: Final = re.compile(r"(-[0-9]{5}-of-[0-9]{5})?\.gguf$")
_FORMAT_OF_FILE: Final = re.compile(r"\.(?=(i?q[2-8]_[^.]*|b?f16|f32)$)")
"""The point before a format in the name of a file of GGUF, where others have a hyphen."""
_MANNER: Final = re.compile(r"unsloth|ud|dynamic|static|block|channel|g(32|64|128)")
"""Words that may stand beside the format."""


def base_warning(named: str, base: str) -> Finding | None:
    """Return a warning when an adapter names another base than the one it will run on; its shapes fit.

    Args:
        named: what the adapter says.
        base: the deployment's.
    """
    if named and plain_name(named) == plain_name(base):
        return None
    found, fix = excerpt(named) or "no name", "Its shapes fit. Check that it was trained on this base."
    return Finding(
        code="W_BASE", where=f"{CONFIG}: base_model_name_or_path", expected=base, found=found, fix=fix
    )


def plain_name(name: str) -> str:
    """Return the last part of a repository or path, without what copies in another format add."""
    file = name.rstrip("/").rpartition("/")[2].lower()
    stem = _FILE.sub("", file)
    words = (stem if stem == file else _FORMAT_OF_FILE.sub("-", stem)).split("-")
    end = len(words)
    while end > 1 and (_FORMAT.fullmatch(words[end - 1]) or _MANNER.fullmatch(words[end - 1])):
        end -= 1
    copied = any(map(_FORMAT.fullmatch, words[end:]))
    return "-".join(words[:end] if copied else words)
