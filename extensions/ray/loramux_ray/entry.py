"""The entry of ``loramux ray`` in the list of commands."""

from typing import Final

from loramux.cli.late import Command, Run


def ray() -> Run:
    """Serve a deployment on a Ray cluster."""
    from loramux_ray.command import app

    return app


RAY: Final = Command(ray, is_group=True)
