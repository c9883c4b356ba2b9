"""``loramux cancel``: end a running build."""

from __future__ import annotations

from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.client import BUILDER, Client
from loramux.records import DeploymentState


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
