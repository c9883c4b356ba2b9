"""``loramux builder`` and ``loramux serve``: become the service's process."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from loramux.cli import shell
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import SettingsInvalid
from loramux_shared.gguf.header import parts_of
from loramux_shared.process import python

# Packages that the service cannot do without.
NEEDS = {
    "builder": ("numpy", "ml_dtypes", "huggingface_hub"),
    "inference": ("torch", "tokenizers", "jinja2", "numpy", "starlette", "uvicorn"),
}
Listen = Annotated[
    str | None, typer.Option("--grpc", metavar="HOST:PORT", help="Address; port 0: any free one.")
]
ListenHttp = Annotated[
    str | None, typer.Option("--http", metavar="HOST:PORT", help="Address of the HTTP APIs.")
]
StoreFlag = Annotated[
    str | None, typer.Option("--store", metavar="URI", help="Store: s3://bucket/prefix or file:///dir.")
]
KeysFile = Annotated[
    Path | None, typer.Option("--keys-file", metavar="FILE", help="File of API keys; see loramux keys.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Accept other machines without keys.")]


@shell.command
def builder(
    store: StoreFlag = None,
    grpc: Listen = None,
    local_root: shell.LocalRoots = None,
    keys_file: KeysFile = None,
    insecure: Insecure = False,
) -> None:
    """Run the builder service until SIGTERM; needs no torch.

    Flags that are not given come from the environment, then from the defaults.

    Example: loramux builder --grpc 0.0.0.0:50051 --keys-file keys.jsonl
    """
    become([*builder_command(store, grpc, local_root or ()), *access_flags(keys_file, insecure)])


@shell.command
def serve(
    deployment: Annotated[
        str | None, typer.Option("--deployment", metavar="NAME", help="Name of the deployment to serve.")
    ] = None,
    store: StoreFlag = None,
    grpc: Listen = None,
    http: ListenHttp = None,
    local_root: shell.LocalRoots = None,
    backend: shell.Backend = None,
    dtype: shell.Dtype = None,
    threads: shell.Threads = None,
    api_processes: shell.ApiProcesses = None,
    builder: Annotated[
        str | None,
        typer.Option(
            "--builder", metavar="HOST:PORT", help="Builder that publishes adapters for this replica."
        ),
    ] = None,
    on_base_change: Annotated[
        str | None,
        typer.Option(
            "--on-base-change", metavar="stay|exit", help="Reaction to a generation that needs a restart."
        ),
    ] = None,
    keys_file: KeysFile = None,
    insecure: Insecure = False,
) -> None:
    """Run the inference service of a deployment until SIGTERM.

    Flags that are not given come from the environment, then from the defaults.

    Example: loramux serve --deployment my-model --store s3://models/loramux
    """
    engine = {"backend": backend, "dtype": dtype, "threads": threads, "api_processes": api_processes}
    engine |= {"builder": builder, "on-base-change": on_base_change}
    argv = inference_command(deployment, store, grpc, local_root or (), engine, http)
    become([*argv, *access_flags(keys_file, insecure)])


def builder_command(
    store: str | None, grpc: str | None, local_roots: Sequence[Path], extra: str = "builder"
) -> list[str]:
    """Return the command line of a builder; raise SettingsInvalid where its packages are not installed.

    extra is what installs those that the caller needs.
    """
    require_packages("builder", extra)
    return [*python("builder_service"), *_flags(store=store, grpc=grpc), *_roots(local_roots)]


def inference_command(
    deployment: str | None,
    store: str | None,
    grpc: str | None,
    local_roots: Sequence[Path],
    engine: Mapping[str, str | int | None],
    http: str | None = None,
) -> list[str]:
    """Return the command line of an inference service; without http, the HTTP APIs stay closed.

    engine holds settings that are about speed, by name; None: the default. Raise SettingsInvalid where its
    packages are not installed.
    """
    require_packages("inference", "inference")
    flags = _flags(deployment=deployment, store=store, grpc=grpc, http=http, **engine)
    return [*python("inference_service"), *flags, *_roots(local_roots)]


def access_flags(keys_file: Path | None, insecure: bool) -> list[str]:
    """Return the flags of a service that say who may enter."""
    file = None if keys_file is None else os.path.realpath(keys_file.expanduser())
    return [*_flags(**{"keys-file": file}), *(["--insecure"] if insecure else [])]


def become(argv: Sequence[str]) -> None:
    """Replace this process, so that signals reach the service itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(argv[0], list(argv))  # noqa: S606 - no shell is wanted


def _flags(**values: str | int | None) -> list[str]:
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items() if value is not None}
    return [text for flag, value in flags.items() for text in (flag, str(value))]


def _roots(folders: Sequence[Path]) -> list[str]:
    return [text for folder in folders for text in ("--local-root", os.path.realpath(folder.expanduser()))]


def require_packages(service: str, extra: str) -> None:
    """Raise SettingsInvalid where packages of a service are not installed; extra is what installs them."""
    missing = [name for name in NEEDS[service] if importlib.util.find_spec(name) is None]
    if missing:
        needs = f"the {service} service needs {', '.join(missing)}, not installed here"
        raise SettingsInvalid(f"{needs}: pip install 'loramux[{extra}]'")


def local_roots(repositories: Iterable[Repository]) -> list[Path]:
    """Return the folders of LOCAL repositories, and all files of models that are in several, each once.

    The files of a snapshot in the hub's cache (``models--ORG--NAME/snapshots/COMMIT``) are links
    into ``blobs`` beside it, so that folder is one too.
    """
    named = [Path(each.repo) for each in repositories if each.source is SourceKind.LOCAL]
    folders = [part for path in named for part in parts_of(path)]
    blobs = [folder.parent.with_name("blobs") for folder in folders if folder.parent.name == "snapshots"]
    return list(dict.fromkeys([*folders, *(folder for folder in blobs if folder.is_dir())]))
