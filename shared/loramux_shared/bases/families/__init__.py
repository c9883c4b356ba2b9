"""The families that are served: every `Family` of a module here, found by being here, and those of encoders."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from loramux_shared.bases.family import Architecture, Family
from loramux_shared.extensions import PARTS, find_extensions, load_extension


def load_families(*, encoders: bool = True) -> dict[str, tuple[Architecture, Family]]:
    """Return every architecture by its name, with its family; encoders come last, unless they are left out."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    modules += _encoders() if encoders else ()
    found = [value for module in modules for value in vars(module).values()]
    return {
        architecture.name: (architecture, family)
        for family in found
        if isinstance(family, Family)
        for architecture in family.architectures
    }


@cache
def _encoders() -> tuple[ModuleType, ...]:
    """Return the module of the extension `encoders`; none where it is not installed."""
    part = find_extensions(PARTS).get("encoders.families")
    return () if part is None else (load_extension(part),)
