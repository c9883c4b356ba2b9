"""The installed packages, and the features that missing ones would bring; nothing is imported for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final

LISTED: Final = (
    *("loramux", "grpcio", "protobuf", "pydantic", "numpy", "safetensors", "tokenizers", "torch", "triton"),
    *("boto3", "huggingface-hub"),
)
NOT_FOR_USERS: Final = frozenset({"train", "test"})


@dataclass(frozen=True)
class Extra:
    """Packages that are installed together."""

    name: str
    missing: tuple[str, ...]

    @property
    def cure(self) -> str:
        """Return the command that installs it."""
        return f"pip install 'loramux[{self.name}]'"


def versions() -> dict[str, str | None]:
    """Return the packages worth knowing with their versions; None: not installed."""
    return {name: version_of(name) for name in LISTED}


def version_of(name: str) -> str | None:
    """Return the version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def extras(requirements: list[str] | None = None) -> list[Extra]:
    """Return the extras with what each lacks here; requirements are loramux's own when not given."""
    table = _by_extra(requires("loramux") or [] if requirements is None else requirements)
    return [
        Extra(name, tuple(sorted(need for need in _needs(name, table) if version_of(need) is None)))
        for name in table
        if name not in NOT_FOR_USERS
    ]


def _by_extra(requirements: list[str]) -> dict[str, list[str]]:
    """Return the requirements of each extra, of a wheel's ``boto3>=1.36; extra == 'store'``."""
    table: dict[str, list[str]] = {}
    for line in requirements:
        if found := re.search(r"extra == ['\"]([\w-]+)['\"]", line):
            table.setdefault(found[1], []).append(line.partition(";")[0].strip())
    return table


def _needs(extra: str, table: Mapping[str, list[str]]) -> set[str]:
    """Return the packages of an extra, those of the extras that it names included."""
    found: set[str] = set()
    for requirement in table.get(extra, ()):
        if inner := re.fullmatch(r"loramux\[([\w,\s-]+)\].*", requirement):
            for name in inner[1].split(","):
                found |= _needs(name.strip(), table)
        else:
            found.add(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    return found
