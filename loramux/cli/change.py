"""``loramux add``, ``remove`` and ``push``: a deployment changed adapter by adapter."""

import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from loramux.cli import shell
from loramux.cli.build import Tell, follow, run_followed
from loramux.cli.build_view import show_warnings
from loramux.cli.documents import emit
from loramux.client import BUILDER, AsyncClient, Client
from loramux.records import DeploymentInfo
from loramux_shared.deployment import SCHEMES, Repository, SourceKind
from loramux_shared.faults import DeploymentInvalid, DeploymentNotFound, Fault, RepoNotFound, SourceRefused
from loramux_shared.spelling import parse_repository
from loramux_shared.wording import listed

SomeDeployment = Annotated[
    str, typer.Option("--deployment", "-d", metavar="NAME", help="Deployment; default: the builder's only one.")
]
Expected = Annotated[
    int | None, typer.Option("--expect", metavar="N", min=1, help="Refuse unless N is the newest generation.")
]
Adapter = Annotated[str, typer.Argument(metavar="NAME", help="Name of the adapter, for clients.")]
Adapters = Annotated[
    list[str], typer.Argument(metavar="NAME...", help="Names of the adapters.", show_default=False)
]
Repo = Annotated[
    str, typer.Argument(metavar="REPO", help=f"Repository: org/name[@rev], path, {' '.join(SCHEMES)}")
]
Source = Annotated[
    SourceKind | None,
    typer.Option(
        "--source", metavar="KIND", help="HF, S3, GCS, AZURE, REMOTE_URL, OCI, MLFLOW or LOCAL; else by REPO."
    ),
]
Revision = Annotated[str, typer.Option("--revision", metavar="REV", help="Branch, tag, commit or digest.")]
Subfolder = Annotated[str, typer.Option("--subfolder", metavar="DIR", help="Folder inside the repository.")]
Secret = Annotated[str, typer.Option("--secret", metavar="NAME", help="Name of the repository's secret.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that PEFT saved.", show_default=False)]
OwnName = Annotated[str, typer.Option("--name", metavar="NAME", help="Adapter's name; default: the folder's.")]


@shell.command
def add(
    name: Adapter,
    repo: Repo,
    deployment: SomeDeployment = "",
    builder: shell.Builder = BUILDER,
    source: Source = None,
    revision: Revision = "",
    subfolder: Subfolder = "",
    secret: Secret = "",
    expect: Expected = None,
    as_json: shell.JsonLines = False,
) -> None:
    """Add an adapter to a deployment, or replace one.

    Nothing else of the deployment is fetched or made again.

    Example: loramux add support my-org/support-lora@v2 --deployment my-model
    """
    repository = named_repository(repo, source, revision, subfolder, secret)
    run_update(builder, deployment, {name: repository}, [], expect, as_json)


@shell.command
def remove(
    names: Adapters,
    deployment: SomeDeployment = "",
    builder: shell.Builder = BUILDER,
    expect: Expected = None,
    as_json: shell.JsonLines = False,
) -> None:
    """Remove adapters from a deployment.

    Requests that run end on them; a rollback brings them back.

    Example: loramux remove old older --deployment my-model
    """
    run_update(builder, deployment, {}, names, expect, as_json)


@shell.command
def push(
    folder: Folder,
    name: OwnName = "",
    deployment: SomeDeployment = "",
    builder: shell.Builder = BUILDER,
    expect: Expected = None,
    as_json: shell.Json = False,
) -> None:
    """Send an adapter of this machine to a deployment.

    The builder needs no access to the folder.

    Example: loramux push ./trained --name support --deployment my-model
    """
    called = name or folder.resolve().name
    with Client(builder=builder) as client:
        deployment_name = deployment or only_deployment(client)
        with shell.working(f"sending {folder}"):
            pushed = client.push(deployment_name, called, folder, expected_generation=expect)
    if as_json:
        emit({"deployment": deployment_name, "pushed": pushed})
        return
    show_warnings([replace(pushed.adapter, name=called)])
    unchanged = ", unchanged" if pushed.unchanged else ""
    made = f"{shell.digest(pushed.digest)}, {decimal(pushed.adapter.bundle_bytes)}"
    shell.show(f"{called}: {made}, in generation {pushed.generation} of {deployment_name}{unchanged}")


def named_repository(
    repo: str, source: SourceKind | None, revision: str, subfolder: str, secret: str
) -> Repository:
    """Return the repository that a word and flags name; raise DeploymentInvalid where they name none."""
    try:
        found = Repository(source=source, repo=repo) if source else parse_repository(repo)
        flags = {"revision": revision, "subfolder": subfolder, "runtime_secret_name": secret}
        options = {field: value for field, value in flags.items() if value}
        return Repository.model_validate(found.model_dump() | options)
    except ValueError as error:
        raise DeploymentInvalid.of_field(
            "the arguments name no repository", "repository", "a repository", repr(repo[:80])
        ) from error


def only_deployment(client: Client) -> str:
    """Return the one deployment that a builder has; raise DeploymentNotFound where it has none, or several."""
    names = [info.name for info in client.deployments()]
    if len(names) != 1:
        raise DeploymentNotFound(
            f"which deployment? {client.builder} has {listed(names)}. Say --deployment NAME."
        )
    return names[0]


def run_update(
    builder: str,
    deployment: str,
    add: Mapping[str, Repository],
    remove: list[str],
    expected: int | None,
    as_json: bool,
) -> None:
    """Update a deployment and show it."""
    if not deployment:
        with Client(builder=builder) as client, shell.working(f"asking {builder}"):
            deployment = only_deployment(client)

    async def work(client: AsyncClient, tell: Tell) -> DeploymentInfo:
        request_id = str(uuid.uuid4())
        tell(await client.update(deployment, add, remove, expected_generation=expected, request_id=request_id))
        return await follow(client, deployment, tell, request_id)

    try:
        run_followed(builder, work, as_json, f"`loramux watch {deployment}` shows it")
    except (RepoNotFound, SourceRefused) as fault:
        raise _also_here(fault, add) from fault


def _also_here(fault: Fault, add: Mapping[str, Repository]) -> Fault:
    """Return a fault that also says whether this machine has the folder that the builder's cannot read."""
    for name, repository in add.items():
        if repository.source is SourceKind.LOCAL:
            folder = Path(repository.repo) / repository.subfolder
            push = f"This machine has it: `loramux push {folder} --name {name}` sends it."
            here = push if folder.is_dir() else "This machine has no such folder."
            return fault.with_message(f"{fault.message} {here}")
    return fault
