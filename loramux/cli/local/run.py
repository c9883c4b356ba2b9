"""``loramux run``: a base and its adapters served without a deployment file, as `loramux up` serves one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer
import yaml

from loramux.cli import shell
from loramux.cli.check import MaxRank
from loramux.cli.local.up import DEFAULT_STORE, HttpAddress, plan_of, preflight, serve
from loramux_shared.deployment import Deployment, Repository
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import DeploymentInvalid, SettingsInvalid
from loramux_shared.spelling import parse_repository

Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="Base: org/name[@rev], path, GGUF file or address.", show_default=False
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", metavar="NAME=REPO", help="Adapter, named as BASE is; repeatable."),
]
OwnName = Annotated[
    str, typer.Option("--name", metavar="NAME", help="Name of the base; default: the repository's.")
]
Save = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE", help="Also write a deployment file, for `loramux up`."),
]
_GGUF_END: Final = re.compile(r"(-[0-9]{5}-of-[0-9]{5})?\.gguf$")
_NOT_IN_NAMES: Final = re.compile(r"[^a-zA-Z0-9_.\-]+")


@shell.command
def run(
    base: Base,
    adapter: Adapters = None,
    name: OwnName = "",
    save: Save = None,
    max_rank: MaxRank = 64,
    store: shell.Store = DEFAULT_STORE,
    grpc: shell.Grpc = "",
    http: HttpAddress = "",
    builder: shell.Builder = "",
    as_json: shell.Json = False,
) -> None:
    """Serve a base and adapters without a file, until Ctrl-C.

    The same command again keeps what is built, and adapters that were pushed.

    Example: loramux run org/base --adapter support=my-org/support-lora
    """
    deployment = deployment_of(parse_repository(base), adapter or (), name, max_rank)
    plan = plan_of(deployment, store, grpc, http, builder)
    preflight(plan)
    if save is not None:
        save_deployment(deployment, save)
    serve(plan, as_json=as_json)


def deployment_of(base: Repository, adapters: Sequence[str], name: str, max_rank: int) -> Deployment:
    """Return the deployment of a base and of adapters, each NAME=REPO; raise DeploymentInvalid for other words
    and for names that cannot be.
    """
    repositories: dict[str, Repository] = {}
    for word in adapters:
        own, equals, repository = word.partition("=")
        if not equals or own in repositories:
            expected = "NAME=REPO, with another name for each"
            raise DeploymentInvalid.of_field("no such adapter", "--adapter", expected, repr(word[:120]))
        repositories[own] = parse_repository(repository)
    build = {
        "checkpoint_repository": _fields(base),
        "lora_adapters": {own: _fields(repository) for own, repository in repositories.items()},
        "lora_configuration": {"max_lora_rank": max_rank},
    }
    return parse_deployment({"model_name": name or name_of_base(base), "build": build}).deployment


def name_of_base(base: Repository) -> str:
    """Return the last part of a repository's address or path, with a dash for what names may not have."""
    last = _GGUF_END.sub("", base.repo.split("?")[0].rstrip("/").rpartition("/")[2])
    return _NOT_IN_NAMES.sub("-", last).strip("-.") or "base"


def save_deployment(deployment: Deployment, file: Path) -> None:
    """Write a deployment file; raise SettingsInvalid where that is not possible, or would lose another file."""
    text = yaml.safe_dump(_fields(deployment), sort_keys=False, allow_unicode=True)
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(text)
    except OSError as error:
        if isinstance(error, FileExistsError) and file.is_file() and file.read_text("utf-8") == text:
            return
        found = error.strerror or str(error)
        raise SettingsInvalid(f"--save: expected a new file, found {file}: {found}. Name another.") from error
    shell.say(f"wrote {file}: `loramux up {file}` serves the same")


def _fields(model: Repository | Deployment) -> dict[str, object]:
    fields: dict[str, object] = model.model_dump(mode="json", exclude_defaults=True)
    return fields
