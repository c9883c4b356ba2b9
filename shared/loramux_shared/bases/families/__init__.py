"""The families that are served: every module here holds one ``FAMILY``, and is found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from loramux_shared.bases.family import Architecture, Family


def load_families() -> dict[str, tuple[Architecture, Family]]:
    """Return every architecture by its name, with its family."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    families: list[Family] = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {
        architecture.name: (architecture, family)
        for family in families
        for architecture in family.architectures
    }
