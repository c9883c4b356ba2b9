"""Entries of packages beside the core: what each adds to a port, found by its entry points.

An entry point of the group `GROUP` is named PORT.NAME, and leads to an entry: an object of the port's type that
has all that is known of it. Entries of the core need none: the modules of a port import them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:  # faults are imported where one is raised: the command line lists its commands without
    from loramux_shared.faults import SettingsInvalid

GROUP: Final = "loramux.ports"

Entry = TypeVar("Entry")
Notify = Callable[[str, "SettingsInvalid"], None]


def registered(port: str, kind: type[Entry], left_out: Notify | None = None) -> dict[str, Entry]:
    """Return the entries of a port by their names, in the order of the names.

    What cannot be imported, or is none, is left out, and left_out is called with its name and the reason.

    Raises:
        SettingsInvalid: the same, where nobody is told.
    """
    entries = {}
    for name, point in _declared(port).items():
        with importing(name, _package_of(point), left_out):
            entries[name] = _load(point, kind)
    return entries


def entry_of(port: str, name: str, kind: type[Entry]) -> Entry | None:
    """Return one entry of a port; None where there is none of this name."""
    point = _declared(port).get(name)
    if point is None:
        return None
    with importing(name, _package_of(point)):
        return _load(point, kind)


def names(port: str) -> tuple[str, ...]:
    """Return the names of a port's entries, in their order; none of them is imported."""
    return tuple(_declared(port))


def required(port: str, kind: type[Entry], what: str) -> Entry:
    """Return the first entry of a port for what needs one; raise SettingsInvalid where there is none."""
    for entry in registered(port, kind).values():
        return entry
    from loramux_shared.faults import SettingsInvalid

    raise SettingsInvalid(f"{what}: expected an installed package that brings {port}, found none.")


def log_left_out(name: str, fault: "SettingsInvalid") -> None:
    """Warn of an entry that is left out."""
    import structlog  # which a client may lack

    structlog.get_logger().warning("extension is left out", extension=name, why=fault.message)


def _declared(port: str) -> dict[str, EntryPoint]:
    """Return the entry points of a port by the names of the entries."""
    points = _all_declared(*sys.path)
    mine = (name for name in sorted(points) if name.partition(".")[0] == port)
    return {name.partition(".")[2]: points[name] for name in mine}


@cache
def _all_declared(*_: str) -> dict[str, EntryPoint]:
    """Find them once for the places where Python looks: the metadata of all packages are read for it.

    An entry point whose package is not there is no entry: the folder of an extension may be deleted.
    """
    return {point.name: point for point in entry_points(group=GROUP) if find_spec(_package_of(point))}


def _package_of(point: EntryPoint) -> str:
    return point.module.partition(".")[0]


class _OtherType(Exception):
    """An entry that is not of its port's type."""


def _load(point: EntryPoint, kind: type[Entry]) -> Entry:
    entry: object = point.load()
    if not isinstance(entry, kind):
        raise _OtherType(f"expected a {kind.__name__}, found {type(entry).__name__}")
    return entry


@contextmanager
def importing(name: str, package: str, left_out: Notify | None = None) -> Iterator[None]:
    """Import what an entry of a package needs; where that fails, call left_out, or raise SettingsInvalid."""
    try:
        yield
    except Exception as error:  # the code of another package, which may raise anything while it is imported
        fault = _fault_of(name, package, error)
        if left_out is None:
            raise fault from error
        left_out(name, fault)


def _fault_of(name: str, package: str, error: Exception) -> "SettingsInvalid":
    from loramux_shared.faults import SettingsInvalid

    if isinstance(error, ModuleNotFoundError):
        extra = package.removeprefix("loramux_") if package.startswith("loramux_") else ""
        cure = f"pip install 'loramux[{extra}]'" if extra else f"install them, or uninstall {package}"
        return SettingsInvalid(
            f"the extension {name!r} needs packages that are not installed here ({error.name}): {cure}"
        )
    if isinstance(error, _OtherType):
        return SettingsInvalid(
            f"the extension {name!r}: {error}. Fix the entry point of its package {package}, or remove it."
        )
    why = " ".join(str(error).split())
    return SettingsInvalid(
        f"the extension {name!r} cannot be imported: {type(error).__name__}: {why}. "
        f"Install what it needs, or remove its package {package}."
    )
