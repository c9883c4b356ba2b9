"""``loramux build``: a deployment file to the builder, and its progress back."""

import asyncio
from collections.abc import Callable
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.build_view import BuildLines, BuildView, show_built
from loramux.client import BUILDER, AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import DeploymentFile, load_deployment
from loramux_shared.faults import InternalFault

Exact = Annotated[bool, typer.Option("--exact", help="Remove adapters that the file does not name.")]


@shell.command
def build(
    file: shell.File,
    builder: shell.Builder = BUILDER,
    truncate_to: shell.TruncateTo = None,
    prove: Annotated[bool, typer.Option("--prove", help="Record each adapter's expected answers.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read reused bundles back, repair damaged ones.")
    ] = False,
    exact: Exact = False,
    as_json: shell.JsonLines = False,
) -> None:
    """Fetch, check, convert and publish a file's adapters.

    Repeating it is safe: unchanged adapters are kept, and so are
    those that were added or pushed. With --json the first and the last line have
    all adapters, the others those that changed.

    Example: loramux build deployment.yaml
    """
    deployment = overridden(read_deployment(file).deployment, truncate_to, prove)
    run_build(builder, deployment, as_json, verify=verify, exact=exact)


@shell.command
def prove(file: shell.File, builder: shell.Builder = BUILDER, as_json: shell.JsonLines = False) -> None:
    """Build a file, and record what each adapter should answer.

    A reference computes it from the adapter's own files; the builder needs torch
    for it. A replica serves only what answers so. The file may say it itself:
    prove: true, under build.

    Example: loramux prove deployment.yaml
    """
    run_build(builder, overridden(read_deployment(file).deployment, None, True), as_json)


def overridden(deployment: Deployment, truncate_to: int | None, prove: bool) -> Deployment:
    """Return a deployment with what the command line asks for beside its file."""
    lora = deployment.build.lora_configuration
    if truncate_to is not None:
        lora = lora.model_copy(update={"truncate_to_rank": truncate_to})
    update = {"lora_configuration": lora, "prove": prove or deployment.build.prove}
    return deployment.model_copy(update={"build": deployment.build.model_copy(update=update)})


def run_build(
    builder: str, deployment: Deployment, as_json: bool, *, verify: bool = False, exact: bool = False
) -> None:
    """Build, and show it."""
    try:
        asyncio.run(_build(builder, deployment, as_json, verify, exact))
    except KeyboardInterrupt:
        shell.say("the builder goes on; the same command shows it again")
        raise


def read_deployment(path: shell.File) -> DeploymentFile:
    """Read a deployment file and say which of its keys mean nothing here, or ask for what is not done."""
    read = load_deployment(path)
    if read.ignored:
        shell.say(f"ignored, since they have no effect here: {', '.join(read.ignored)}", "dim")
    for warning in read.warnings:
        shell.say(f"warning: {warning}", "yellow")
    return read


async def _build(address: str, deployment: Deployment, as_json: bool, verify: bool, exact: bool) -> None:
    async with AsyncClient(builder=address) as client:
        if as_json:
            await follow_build(client, deployment, BuildLines().tell, verify=verify, exact=exact)
        else:
            show_built(await build_with_bars(client, deployment, verify=verify, exact=exact))


async def build_with_bars(
    client: AsyncClient, deployment: Deployment, *, verify: bool = False, exact: bool = False
) -> DeploymentInfo:
    """Build a deployment, show its progress on stderr; raises what it failed with."""
    with BuildView() as view:
        return await follow_build(client, deployment, view.update, verify=verify, exact=exact)


async def follow_build(
    client: AsyncClient,
    deployment: Deployment,
    tell: Callable[[DeploymentInfo], None],
    *,
    verify: bool = False,
    exact: bool = False,
) -> DeploymentInfo:
    """Build a deployment, print all its states and return the last; raises its fault."""
    tell(await client.build(deployment, verify=verify, exact=exact))
    return await follow(client, deployment.model_name, tell)


async def follow(
    client: AsyncClient, name: str, tell: Callable[[DeploymentInfo], None], request_id: str | None = None
) -> DeploymentInfo:
    """Print the states of a deployment until its build ends; raises its fault."""
    last: DeploymentInfo | None = None
    async for last in client.watch(name, request_id=request_id):
        tell(last)
    if last is None or last.state not in (DeploymentState.ACTIVE, DeploymentState.FAILED):
        raise InternalFault(
            f"the builder ended the stream of events while the build of {name} runs. Run the command again."
        )
    if last.failure and last.state is DeploymentState.FAILED:
        raise last.failure
    return last
