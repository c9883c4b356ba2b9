"""Extensions: packages beside the core that add commands and gRPC services, found through entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Final

COMMANDS: Final = "loramux.commands"
"""The entry points of commands: functions, or `typer.Typer` groups."""
SERVICES: Final = "loramux.services"
"""The entry points of gRPC services of a replica: classes as `inference_service.rpc.extensions` says."""


def find_extensions(group: str) -> dict[str, EntryPoint]:
    """Return the entry points that installed packages declare for a group, by name, in the order of the names.

    An entry point whose package is not there is left out: the folder of an extension may be deleted.
    """
    found = sorted(entry_points(group=group), key=lambda point: point.name)
    return {point.name: point for point in found if find_spec(point.module.partition(".")[0])}


def load_extensions(group: str) -> dict[str, Any]:
    """Return the objects of these entry points, by name."""
    return {name: point.load() for name, point in find_extensions(group).items()}
