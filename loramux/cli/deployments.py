"""Commands about what a builder has: deployments, the builds that run, generations and the way back to one."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer

from loramux.changes import ChangeKind, GenerationInfo
from loramux.cli import shell
from loramux.cli.build import follow
from loramux.cli.build_view import BuildLines, BuildView, show_built
from loramux.cli.change import Expected, only_deployment
from loramux.cli.documents import emit
from loramux.client import BUILDER, AsyncClient, Client
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.faults import DeploymentNotFound
from loramux_shared.wording import is_whole, listed

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the deployment.", show_default=False)]
Some = Annotated[str, typer.Argument(metavar="[NAME]", help="Name of one deployment.", show_default=False)]


@shell.command
def deployments(name: Some = "", builder: shell.Builder = BUILDER, as_json: shell.Json = False) -> None:
    """List the deployments of a builder, or show one.

    Example: loramux deployments --builder 127.0.0.1:50051
    """
    with Client(builder=builder) as client, shell.working(f"asking {builder}"):
        found = [client.deployment(name)] if name else client.deployments()
    if as_json:
        emit({"deployments": found})
        return
    show_deployments(found)
    for info in found if name else ():
        if info.failure:
            shell.complain(info.failure)


@shell.command
def watch(name: Name, builder: shell.Builder = BUILDER, as_json: shell.JsonLines = False) -> None:
    """Follow the build of a deployment to its end.

    A build that failed is a failure here too. Without a running build the last
    one is shown.

    Example: loramux watch my-model
    """
    asyncio.run(_watch(builder, name, as_json))


async def _watch(builder: str, name: str, as_json: bool) -> None:
    async with AsyncClient(builder=builder) as client:
        if as_json:
            await follow(client, name, BuildLines().tell)
            return
        with BuildView() as view:
            info = await follow(client, name, view.update)
        show_built(info)


def show_deployments(found: Sequence[DeploymentInfo]) -> None:
    """Print a table of deployments."""
    headers = ("deployment", "state", "generation", "adapters", "changed", "failure")
    rows = [
        (
            info.name,
            str(info.state),
            str(info.generation or "-"),
            str(len(info.adapters)),
            _time(info.update_time),
            info.failure.reason if info.failure else "-",
        )
        for info in found
    ]
    shell.table(headers, rows, frozenset({"generation", "adapters"}))


def _time(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"


@shell.command
def cancel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The deployment.", show_default=False)],
    builder: shell.Builder = BUILDER,
    as_json: shell.Json = False,
) -> None:
    """End the running build of a deployment.

    What was served before is served still.

    Example: loramux cancel my-model
    """
    with Client(builder=builder) as client:
        info = client.cancel(name)
        ran = info.state is DeploymentState.BUILDING
        if ran:
            with shell.working(f"waiting for the end of {name}"):
                *_, info = client.watch(name)
    if as_json:
        emit({"cancelled": ran, "deployment": info})
        return
    if not ran:
        shell.show(f"{name}: no build runs; it is {info.state}")
        return
    reason = f", {info.failure.reason}" if info.failure else ""
    shell.show(f"{name}: {info.state}{reason}")


NAMES = 6
"""Most names of one kind of change of one generation; --json has more."""
SIGNS = {ChangeKind.ADDED: "+", ChangeKind.CHANGED: "~", ChangeKind.REMOVED: "-"}

DeploymentName = Annotated[
    str,
    typer.Argument(
        metavar="[DEPLOYMENT]", help="Deployment; default: the builder's only one.", show_default=False
    ),
]


@shell.command
def history(
    name: DeploymentName = "",
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
    name: DeploymentName = "",
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
        published = [] if done.unchanged or as_json else client.history(deployment_name, 1)
    if as_json:
        emit({"deployment": deployment_name, **asdict(done)})
        return
    content = f", as generation {done.restored}" if done.restored else ""
    unchanged = ", unchanged" if done.unchanged else ""
    shell.show(f"deployment {deployment_name}: generation {done.generation} is published{content}{unchanged}")
    for each in published:
        if each.number == done.generation:  # nobody published another one since
            shell.show(f"changes: {_changes(each)}")


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
