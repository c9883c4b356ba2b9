"""``loramux build``: a deployment file to the builder, and its progress back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeAlias

import typer

from loramux.cli import shell
from loramux.cli.build_view import BuildLines, BuildView, show_built
from loramux.client import BUILDER, AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import DeploymentFile, load_deployment
from loramux_shared.faults import InternalFault

Tell: TypeAlias = Callable[[DeploymentInfo], None]
"""Shows a state of a build."""
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

    def work(client: AsyncClient, tell: Tell) -> Awaitable[DeploymentInfo]:
        return follow_build(client, deployment, tell, verify=verify, exact=exact)

    run_followed(builder, work, as_json, "the same command shows it again")


def run_followed(
    builder: str, work: Callable[[AsyncClient, Tell], Awaitable[DeploymentInfo]], as_json: bool, again: str
) -> None:
    """Run work that follows a build, and show all its states and its end; again is how to see it once more."""

    async def followed() -> DeploymentInfo:
        async with AsyncClient(builder=builder) as client:
            if as_json:
                return await work(client, BuildLines().tell)
            with BuildView() as view:
                return await work(client, view.update)

    try:
        info = asyncio.run(followed())
    except KeyboardInterrupt:
        shell.say(f"the builder goes on; {again}")
        raise
    if not as_json:
        show_built(info)


def read_deployment(path: shell.File) -> DeploymentFile:
    """Read a deployment file and say which of its keys mean nothing here, or ask for what is not done."""
    read = load_deployment(path)
    if read.ignored:
        shell.say(f"ignored, since they have no effect here: {', '.join(read.ignored)}", "dim")
    for warning in read.warnings:
        shell.say(f"warning: {warning}", "yellow")
    return read


async def build_with_bars(
    client: AsyncClient, deployment: Deployment, *, exact: bool = False
) -> DeploymentInfo:
    """Build a deployment, show its progress on stderr; raises what it failed with."""
    with BuildView() as view:
        return await follow_build(client, deployment, view.update, exact=exact)


async def follow_build(
    client: AsyncClient, deployment: Deployment, tell: Tell, *, verify: bool = False, exact: bool = False
) -> DeploymentInfo:
    """Build a deployment, print all its states and return the last; raises its fault."""
    tell(await client.build(deployment, verify=verify, exact=exact))
    return await follow(client, deployment.model_name, tell)


async def follow(client: AsyncClient, name: str, tell: Tell, request_id: str | None = None) -> DeploymentInfo:
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
