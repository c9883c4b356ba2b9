"""``loramux build``: a deployment file to the builder, and its progress back."""

from __future__ import annotations

import asyncio

from loramux.cli import shell
from loramux.cli.build_view import BuildView, show_built
from loramux.client import BUILDER, AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from shared.deployment import Deployment, DeploymentFile, load_deployment
from shared.faults import InternalFault


@shell.command
def build(file: shell.File, builder: shell.Builder = BUILDER) -> None:
    """Fetch, check, convert and publish a file's adapters.

    Repeating it is safe: what is published already is not built again.

    Example: loramux build deployment.yaml
    """
    read = read_deployment(file)
    try:
        asyncio.run(_build(builder, read.deployment))
    except KeyboardInterrupt:
        shell.say("the builder goes on; the same command shows it again")
        raise


def read_deployment(path: shell.File) -> DeploymentFile:
    """Read a deployment file and say which of its keys mean nothing here."""
    read = load_deployment(path)
    if read.ignored:
        shell.say(f"ignored, they mean nothing here: {', '.join(read.ignored)}", "dim")
    return read


async def _build(address: str, deployment: Deployment) -> None:
    async with AsyncClient(builder=address) as client:
        await build_and_show(client, deployment)


async def build_and_show(client: AsyncClient, deployment: Deployment) -> DeploymentInfo:
    """Build a deployment, show its progress and the table; raises what it failed with."""
    info = await client.build(deployment)
    with BuildView() as view:
        view.update(info)
        async for info in client.watch(deployment.model_name):
            view.update(info)
    if info.failure and info.state is DeploymentState.FAILED:
        raise info.failure
    if info.state is not DeploymentState.ACTIVE:
        raise InternalFault(f"the builder stopped telling of a build that is {info.state}. Repeat the command.")
    show_built(info)
    return info
