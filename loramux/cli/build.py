"""``loramux build``: a deployment file to the builder, and its progress back."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.build_view import BuildView, show_built
from loramux.client import BUILDER, AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from shared.deployment import Deployment
from shared.deployment_file import DeploymentFile, load_deployment
from shared.faults import InternalFault


@shell.command
def build(
    file: shell.File,
    builder: shell.Builder = BUILDER,
    truncate_to: shell.TruncateTo = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Also record what each adapter should answer.")
    ] = False,
) -> None:
    """Fetch, check, convert and publish a file's adapters.

    Repeating it is safe: what is published already is not built again.

    Example: loramux build deployment.yaml
    """
    run_build(builder, wished(read_deployment(file).deployment, truncate_to, prove))


@shell.command
def prove(file: shell.File, builder: shell.Builder = BUILDER) -> None:
    """Build a file, and record what each adapter should answer.

    A reference computes it from the adapter's own files; the builder needs torch
    for it. A replica serves only what answers so. The file may say it itself:
    prove: true, under build.

    Example: loramux prove deployment.yaml
    """
    run_build(builder, wished(read_deployment(file).deployment, None, True))


def wished(deployment: Deployment, truncate_to: int | None, prove: bool) -> Deployment:
    """Return a deployment with what the command line asks for beside its file."""
    lora = deployment.build.lora_configuration
    if truncate_to is not None:
        lora = lora.model_copy(update={"truncate_to_rank": truncate_to})
    update = {"lora_configuration": lora, "prove": prove or deployment.build.prove}
    return deployment.model_copy(update={"build": deployment.build.model_copy(update=update)})


def run_build(builder: str, deployment: Deployment) -> None:
    """Build, and show it."""
    try:
        asyncio.run(_build(builder, deployment))
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
