"""One finding per code and cause, however many tensors it is about."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from loramux_shared.faults import Finding
from loramux_shared.wording import listed

MAX_LISTED_PLACES: Final = 3
"""Places that a finding names before it counts the others."""
MAX_PLACE_CHARACTERS: Final = 200
"""Characters of a place that are shown; hostile files have keys of megabytes."""
MAX_CAUSES: Final = 32
"""Findings of one code; hostile files have thousands of causes."""


@dataclass
class _Group:
    expected: str
    found: str
    fix: str
    listed: int
    places: list[str] = field(default_factory=list)


class Grouping:
    """Collects findings in the order in which their causes were met."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, Hashable], _Group] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(
        self,
        code: str,
        place: str,
        *,
        cause: Hashable = "",
        expected: str = "",
        found: str = "",
        fix: str = "",
        places_listed: int = MAX_LISTED_PLACES,
    ) -> None:
        """Add a place; the words of the first place of a cause are kept."""
        group = self._groups.setdefault((code, cause), _Group(expected, found, fix, places_listed))
        group.places.append(
            place if len(place) <= MAX_PLACE_CHARACTERS else place[: MAX_PLACE_CHARACTERS - 3] + "..."
        )

    def findings(self) -> list[Finding]:
        """Return one finding per code and cause; of a code with very many causes, the others are counted."""
        found, causes = [], Counter[str]()
        for (code, _), group in self._groups.items():
            causes[code] += 1
            if causes[code] <= MAX_CAUSES:
                where = listed(group.places, group.listed)
                texts = {"expected": group.expected, "found": group.found, "fix": group.fix}
                found.append(Finding(code=code, where=where, **texts))
        found += [
            Finding(code=code, found=f"{count - MAX_CAUSES} more of this code, each for another cause")
            for code, count in causes.items()
            if count > MAX_CAUSES
        ]
        return found
