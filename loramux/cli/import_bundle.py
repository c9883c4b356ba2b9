"""``loramux import-bundle``: the npy files of another TensorRT-LLM converter, checked and published."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from loramux.cli import shell
from loramux.cli.build import run_build
from loramux.cli.check import (
    Base,
    CheckOptions,
    MaxRank,
    Secret,
    StorageDtype,
    check_with,
    named,
    tell_report,
)
from loramux.client import BUILDER
from loramux_shared.deployment import Deployment, Repository
from loramux_shared.deployment_file import parse_deployment, parse_lora_configuration
from loramux_shared.faults import DeploymentInvalid
from loramux_shared.spelling import parse_repository

FILES = ("model.lora_weights.npy", "model.lora_config.npy or model.lora_keys.npy")
UNPUBLISHED: Final = "_unpublished_"
"""Name of a deployment that only tests whether the adapter's name is valid."""

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the two npy files.", show_default=False)]
Name = Annotated[
    str, typer.Option("--name", metavar="NAME", help="Name of the adapter, for clients.", show_default=False)
]
DeploymentName = Annotated[
    str, typer.Option("--deployment", metavar="NAME", help="Deployment to publish; default: only check.")
]
PublishingBuilder = Annotated[
    str,
    typer.Option(
        "--builder",
        metavar="HOST:PORT",
        help=f"Builder's address; default: a private one, and {BUILDER} with --deployment.",
    ),
]


@shell.command
def import_bundle(
    folder: Folder,
    base: Base,
    name: Name,
    deployment: DeploymentName = "",
    max_rank: MaxRank = 64,
    dtype: StorageDtype = None,
    secret: Secret = "",
    builder: PublishingBuilder = "",
    as_json: shell.Json = False,
) -> None:
    """Check and publish npy files of another converter.

    A deployment file may name such a folder or repository as any other adapter;
    this is the short way for one.

    Example: loramux import-bundle DIR --base org/base --name lora1 --deployment d
    """
    adapter = npy_folder(folder)
    lora = parse_lora_configuration(max_lora_rank=max_rank, dtype=dtype)
    options = CheckOptions(adapter, named(base, secret), lora)
    made = deployment_of_one(deployment or UNPUBLISHED, name, options)
    if deployment:
        run_build(builder or BUILDER, made, as_json)
        return
    tell_report(check_with(builder, options), as_json)
    shell.say("only checked; --deployment NAME publishes it", "dim")


def npy_folder(folder: Path) -> Repository:
    """Return a folder with npy files as a repository.

    Raises:
        DeploymentInvalid: they are not there, or a PEFT adapter is.
    """
    path = Path(os.path.realpath(folder.expanduser()))
    configs = [path / word for word in FILES[1].split(" or ")]
    if not (path / FILES[0]).is_file() or not any(config.is_file() for config in configs):
        raise DeploymentInvalid(f"{path}: expected {FILES[0]} and {FILES[1]}")
    if (path / "adapter_config.json").exists():
        raise DeploymentInvalid(
            f"{path}: expected no adapter_config.json, since a build would take the PEFT adapter"
        )
    return parse_repository(str(path))


def deployment_of_one(deployment: str, name: str, options: CheckOptions) -> Deployment:
    """Return a deployment with one adapter.

    Raises:
        DeploymentInvalid: a name that is none.
    """
    build = {
        "checkpoint_repository": options.base.model_dump(),
        "lora_adapters": {name: options.adapter.model_dump()},
        "lora_configuration": options.lora.model_dump(),
    }
    return parse_deployment({"model_name": deployment, "build": build}).deployment
