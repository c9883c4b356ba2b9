"""``loramux deployments``, ``watch`` and ``cancel``: what a builder has built, and the builds that run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.build import follow
from loramux.cli.build_view import BuildLines, BuildView, show_built
from loramux.cli.documents import emit
from loramux.client import BUILDER, AsyncClient, Client
from loramux.records import DeploymentInfo, DeploymentState

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
