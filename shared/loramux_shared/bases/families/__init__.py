"""The families that are served: every `Family` of a module here, found by being here, and of extensions."""

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from loramux_shared.bases.family import Architecture, Family
from loramux_shared.extensions import PARTS, find_extensions, load_extension


def load_families() -> dict[str, tuple[Architecture, Family]]:
    """Return every architecture by its name, with its family; those of extensions come last."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [value for module in (*modules, *_others()) for value in vars(module).values()]
    return {
        architecture.name: (architecture, family)
        for family in found
        if isinstance(family, Family)
        for architecture in family.architectures
    }


@cache
def _others() -> tuple[ModuleType, ...]:
    """Return the modules of families that extensions have."""
    parts = find_extensions(PARTS).items()
    return tuple([load_extension(part) for name, part in parts if name.rpartition(".")[2] == "families"])
