"""Licences: what a repository says of its own, in the front matter of its README."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import yaml

README: Final = "README.md"
MAX_README: Final = 1 << 20
"""Largest README; a larger one is not read."""
MAX_MATTER: Final = 32 << 10
"""Bytes of front matter; the longest that was seen, with the results of evaluations, has about 20 KB."""
MAX_DEPTH: Final = 20
MAX_LICENCE: Final = 128
OTHER: Final = "other"
"""The hub's licence value for one outside its list; the licence's name may stand beside it."""
FILES: Final = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING")

_MATTER: Final = re.compile(rb"(?:\xef\xbb\xbf)?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_KEYS: Final = ("license", "license_name")


def reads_readme(sizes: Mapping[str, int]) -> bool:
    """True where a repository has a README that is read."""
    return 0 < sizes.get(README, 0) <= MAX_README


def licence_in(folder: Path, names: Collection[str]) -> str:
    """Return the licence of a repository whose README is in a folder, if it has one; names are of its files.

    Empty where it says nothing; ``see LICENSE`` where a file is all that says something.
    """
    path = folder / README
    licence = licence_of(path.read_bytes()) if path.is_file() else ""
    return licence or next((f"see {name}" for name in FILES if name in names), "")


def licence_of(readme: bytes) -> str:
    """Return the licence that a README names, or nothing; what is no front matter says nothing."""
    match = _MATTER.match(readme[: MAX_MATTER + 16])
    if match is None:
        return ""
    try:
        front = _top(match[1].decode())
    except (yaml.YAMLError, ValueError):
        return ""
    licence, name = (", ".join(front.get(key, ())) for key in _KEYS)
    chosen = " ".join((name if licence.casefold() in ("", OTHER) and name else licence).split())
    fits = (
        chosen.isprintable()
        and len(chosen) <= MAX_LICENCE
        and chosen.casefold() not in ("unknown", "null", "~")
    )
    return chosen if fits else ""


def _top(text: str) -> dict[str, list[str]]:
    """Return the texts of the keys that are looked for, of a mapping's first level.

    Nothing is built of the rest, and nothing is looked up: aliases and merges of a few bytes can mean millions
    of values.
    """
    values: dict[str, list[str]] = {}
    key: str | None = None
    inside: list[bool] = []  # whether each is a list
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(isinstance(event, yaml.SequenceStartEvent))
            if len(inside) > MAX_DEPTH:
                return {}
        elif isinstance(event, yaml.CollectionEndEvent):
            inside.pop()
            key = None if len(inside) == 1 else key
        elif isinstance(event, yaml.NodeEvent):
            value = event.value if isinstance(event, yaml.ScalarEvent) else ""
            if inside == [False] and key is None:
                key = value
                continue
            if key in _KEYS and inside in ([False], [False, True]):
                values.setdefault(key, []).append(value)
            key = None if len(inside) == 1 else key
    return values
