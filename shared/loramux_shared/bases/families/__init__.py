"""The families that are served: every `Family` of a module here, found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from loramux_shared.bases.family import Architecture, Family


def load_families() -> dict[str, tuple[Architecture, Family]]:
    """Return every architecture by its name, with its family."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = [value for name in names for value in vars(importlib.import_module(f"{__name__}.{name}")).values()]
    return {
        architecture.name: (architecture, family)
        for family in found
        if isinstance(family, Family)
        for architecture in family.architectures
    }
