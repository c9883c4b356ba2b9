"""``loramux history`` and ``rollback``: what a deployment was, and going back to it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.change import Expected, only_deployment
from loramux.cli.documents import emit
from loramux.client import BUILDER, Client
from loramux.generations import ChangeKind, GenerationInfo
from loramux_shared.faults import DeploymentNotFound
from loramux_shared.wording import is_whole, listed

NAMES = 6
"""Most names of one kind of change of one generation; --json has more."""
SIGNS = {ChangeKind.ADDED: "+", ChangeKind.CHANGED: "~", ChangeKind.REMOVED: "-"}

Name = Annotated[
    str,
    typer.Argument(
        metavar="[DEPLOYMENT]", help="Deployment; default: the builder's only one.", show_default=False
    ),
]


@shell.command
def history(
    name: Name = "",
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="Number of generations, newest first.")
    ] = 20,
    builder: shell.Builder = BUILDER,
    as_json: shell.Json = False,
) -> None:
    """List the generations of a deployment with their changes.

    Example: loramux history my-model
    """
    with Client(builder=builder) as client, shell.working(f"asking {builder}"):
        deployment_name = name or only_deployment(client)
        found = client.history(deployment_name, limit)
    if as_json:
        emit({"deployment": deployment_name, "generations": found})
        return
    rows = [
        (
            str(each.number),
            "-" if each.create_time is None else f"{each.create_time.astimezone():%Y-%m-%d %H:%M:%S}",
            str(each.adapters),
            _changes(each),
            "served" if each.served else "",
        )
        for each in found
    ]
    headers = ("generation", "published", "adapters", "changes", "")
    shell.table(headers, rows, frozenset({"generation", "adapters"}))


@shell.command
def rollback(
    name: Name = "",
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="N", min=1, help="Generation; default: the one before the newest."),
    ] = None,
    builder: shell.Builder = BUILDER,
    expect: Expected = None,
    as_json: shell.Json = False,
) -> None:
    """Serve what an older generation of a deployment says.

    It becomes a new generation, with that one's base, settings and adapters.

    Example: loramux rollback my-model --to 41
    """
    with Client(builder=builder) as client, shell.working(f"asking {builder}"):
        deployment_name = name or only_deployment(client)
        try:
            done = client.rollback(deployment_name, to, expected_generation=expect)
        except DeploymentNotFound as fault:
            if not is_whole(name):
                raise
            raise fault.with_message(
                f"{fault.message}. For generation {name}: `loramux rollback --to {name}`"
            ) from fault
    if as_json:
        emit({"deployment": deployment_name, **asdict(done)})
        return
    content = f", as generation {done.restored}" if done.restored else ""
    unchanged = ", unchanged" if done.unchanged else ""
    shell.show(f"deployment {deployment_name}: generation {done.generation} is published{content}{unchanged}")


def _changes(generation: GenerationInfo) -> str:
    """Return what changed for a cell: ``+a, b; ~c; other settings``."""
    if generation.damage:
        return f"cannot be read: {generation.damage}"
    parts = [
        f"{sign}{listed(names, NAMES)}"
        for kind, sign in SIGNS.items()
        if (names := [change.name for change in generation.changes if change.kind is kind])
    ]
    if (left := generation.change_count - len(generation.changes)) > 0:
        parts.append(f"{left} more")
    if generation.other_settings:
        parts.append("other base or settings")
    return "; ".join(parts) or "-"
