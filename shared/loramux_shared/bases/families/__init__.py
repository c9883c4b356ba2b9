"""The families that are served: every `Family` of a module here, and those of third parties."""

import importlib
import pkgutil
from functools import cache

from loramux_shared.bases.family import Architecture, Family
from loramux_shared.ports import registered


def load_families() -> dict[str, tuple[Architecture, Family]]:
    """Return every architecture by its name, with its family; those of third parties come last."""
    families = (*_own(), *registered("family", Family).values())
    return {each.name: (each, family) for family in families for each in family.architectures}


@cache
def _own() -> tuple[Family, ...]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, Family))
