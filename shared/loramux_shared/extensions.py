"""Extensions: packages beside the core, found through entry points."""

import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Final

from loramux_shared.faults import SettingsInvalid

COMMANDS: Final = "loramux.commands"
"""The entry points of commands: functions, or `typer.Typer` groups."""
PARTS: Final = "loramux.parts"
"""The entry points of modules that the core calls where a setting asks for one, as a `Protocol` there says."""
HTTP_ROUTES: Final = "loramux.routes"
"""The entry points of routes of the HTTP API: tuples of `inference_service.http.endpoint.Endpoint`."""

NAMES: Final = "loramux.names"
"""The entry points of names that the package `loramux` has where an extension is installed."""


def find_extensions(group: str, *, absent: bool = False) -> dict[str, EntryPoint]:
    """Return the entry points that installed packages declare for a group, by name, in the order of the names.

    An entry point whose package is not there is left out, as the folder of an extension may be deleted; with
    absent, all others are.
    """
    declared = _declared(group, *sys.path)
    return {point.name: point for point in declared if (find_spec(package_of(point)) is None) == absent}


@cache
def _declared(group: str, *_: str) -> list[EntryPoint]:
    """Find them once for the places where Python looks: the metadata of all packages are read for it."""
    return sorted(entry_points(group=group), key=lambda point: point.name)


def package_of(point: EntryPoint) -> str:
    """Return the name of the package that an entry point leads to."""
    return point.module.partition(".")[0]


def load_extension(point: EntryPoint) -> Any:
    """Return the object of an entry point; raise SettingsInvalid where its module cannot be imported."""
    try:
        return point.load()
    except ModuleNotFoundError as error:
        raise SettingsInvalid(
            f"the extension {point.name!r} needs packages that are not installed here ({error.name}): "
            f"pip install {_extra(point.name if point.group == PARTS else package_of(point))}"
        ) from error
    except Exception as error:
        why = " ".join(str(error).split())
        raise SettingsInvalid(
            f"the extension {point.name!r} cannot be imported: {type(error).__name__}: {why}. "
            f"Install what it needs, or remove its package {package_of(point)}."
        ) from error


def _warn(name: str, fault: SettingsInvalid) -> None:
    import structlog  # which a client may lack

    structlog.get_logger().warning("extension is left out", extension=name, why=fault.message)


def load_extensions(group: str, left_out: Callable[[str, SettingsInvalid], None] = _warn) -> dict[str, Any]:
    """Return the objects of these entry points, by name; left_out is called for what cannot be imported."""
    loaded = {}
    for name, point in find_extensions(group).items():
        try:
            loaded[name] = load_extension(point)
        except SettingsInvalid as fault:
            left_out(name, fault)
    return loaded


def need_extension(name: str, what: str) -> Any:
    """Return the module of an extension for what needs it; of one with several, NAME.MODULE. Raise
    SettingsInvalid where it is not installed, or cannot be imported.
    """
    try:
        return _part(name)
    except LookupError:
        raise absent(what, name.partition(".")[0]) from None


@cache
def _part(name: str) -> Any:
    """Return a part, which is looked for among all packages once: requests and layers ask for some."""
    return load_extension(find_extensions(PARTS)[name])


def absent(what: str, name: str) -> SettingsInvalid:
    """Return the fault that an extension is not installed; what needs it."""
    return SettingsInvalid(
        f"{what}: expected the extension {name!r}, found none installed: pip install {_extra(name)}"
    )


def _extra(name: str) -> str:
    return f"'loramux[{name.removeprefix('loramux_').partition('.')[0].replace('_', '-')}]'"
