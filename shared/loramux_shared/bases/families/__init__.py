"""The families that are served: every `Family` of a module here, found by being here, and those of encoders."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from types import ModuleType

from loramux_shared.bases.family import Architecture, Family
from loramux_shared.extensions import PARTS, find_extensions, load_extension


def load_families() -> dict[str, tuple[Architecture, Family]]:
    """Return every architecture by its name, with its family; those of the extension `encoders` come last."""
    return load_decoders() | _load_encoders()


def load_decoders() -> dict[str, tuple[Architecture, Family]]:
    """Return the architectures of the modules here."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return _families_of([importlib.import_module(f"{__name__}.{name}") for name in names])


@cache
def _load_encoders() -> dict[str, tuple[Architecture, Family]]:
    """Return the architectures of the extension; none where it is not installed."""
    part = find_extensions(PARTS).get("encoders.families")
    return {} if part is None else _families_of([load_extension(part)])


def _families_of(modules: Iterable[ModuleType]) -> dict[str, tuple[Architecture, Family]]:
    return {
        architecture.name: (architecture, family)
        for module in modules
        for family in vars(module).values()
        if isinstance(family, Family)
        for architecture in family.architectures
    }
