"""``loramux up``: builder and inference service of one deployment, as children of one process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.build import build_with_bars, read_deployment
from loramux.cli.build_view import show_built
from loramux.cli.documents import emit
from loramux.cli.look import until_serving
from loramux.cli.services import builder_command, engine_flags, inference_command
from loramux.cli.tree import ProcessTree, free_address, run_tree
from loramux.client import BUILDER, INFERENCE, AsyncClient
from loramux.records import ModelInfo
from shared.deployment import Deployment, SourceKind

OPENAI = "127.0.0.1:8000"
DEFAULT_STORE = "file://~/.local/share/loramux/store"
BUILDER_START_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What is to be brought up, and where."""

    deployment: Deployment
    store: str
    builder: str
    inference: str
    engine: Sequence[str] = field(default_factory=list)
    """Flags of the inference service that are about speed."""
    http: str | None = None
    """Of OpenAI's door; None keeps it closed."""

    @property
    def local_roots(self) -> list[Path]:
        """The folders that the deployment names."""
        build = self.deployment.build
        repositories = [build.checkpoint_repository, *build.lora_adapters.values()]
        folders = [each.repo for each in repositories if each.source is SourceKind.LOCAL]
        return [Path(folder) for folder in dict.fromkeys(folders)]


@shell.command
def up(
    file: shell.File,
    store: shell.Store = DEFAULT_STORE,
    grpc: shell.Grpc = "",
    http: Annotated[str, typer.Option("--http", metavar="HOST:PORT", help="OpenAI's HTTP door.")] = "",
    builder: shell.Builder = "",
    backend: shell.Backend = None,
    dtype: shell.Dtype = None,
    threads: shell.Threads = None,
    as_json: shell.Json = False,
) -> None:
    """Build a deployment file and serve it, here, until Ctrl-C.

    Addresses that are not given are 127.0.0.1:50051 (builder), :50052 (inference)
    and :8000 (OpenAI's API), or free ports.

    Example: loramux up deployment.yaml
    """
    plan = Plan(
        deployment=read_deployment(file).deployment,
        store=store,
        builder=builder or free_address(BUILDER),
        inference=grpc or free_address(INFERENCE),
        engine=engine_flags(backend, dtype, threads),
        http=http or free_address(OPENAI),
    )
    run_tree(functools.partial(_up, plan=plan, as_json=as_json))


async def _up(tree: ProcessTree, plan: Plan, as_json: bool) -> None:
    async with AsyncClient(inference=plan.inference, builder=plan.builder) as client:
        await start_builder(tree, plan)
        built = await build_with_bars(client, plan.deployment)
        if not as_json:
            show_built(built)
        await start_inference(tree, plan)
        models = await client.models()
    if as_json:
        emit(ready_fields(plan, models, tree.folder))
    else:
        show_ready(plan, models, tree.folder)
    await keep(tree)


async def start_builder(tree: ProcessTree, plan: Plan) -> None:
    """Start the builder and wait until it is SERVING."""
    argv = builder_command(plan.store, plan.builder, plan.local_roots)
    with shell.step(f"builder service on {plan.builder}"):
        await tree.start("builder", argv)
        await until_serving(plan.builder, BUILDER_START_S)


async def start_inference(tree: ProcessTree, plan: Plan) -> None:
    """Start the inference service and wait until it is SERVING, which takes as long as the base loads."""
    name = plan.deployment.model_name
    argv = inference_command(name, plan.store, plan.inference, plan.local_roots, plan.engine, plan.http)
    with shell.step(f"inference service on {plan.inference}"):
        await tree.start("inference", argv)
        await until_serving(plan.inference)


async def keep(tree: ProcessTree) -> None:
    """Stay until a signal ends the tree."""
    tree.ready = True
    shell.say("serving until Ctrl-C", "dim")
    await asyncio.Event().wait()


def ready_fields(plan: Plan, models: Sequence[ModelInfo], logs: Path) -> dict[str, object]:
    """Return for JSON what `show_ready` prints."""
    names = [model.name for model in models]
    addresses = {"inference": plan.inference, "http": plan.http, "builder": plan.builder}
    return {**addresses, "models": names, "logs": logs}


def show_ready(plan: Plan, models: Sequence[ModelInfo], logs: Path) -> None:
    """Print where everything is, and what to try."""
    shell.show()
    shell.show("ready", "bold green")
    shell.show(f"  inference  {plan.inference}")
    shell.show(f"  OpenAI     http://{plan.http}/v1")
    shell.show(f"  page       http://{plan.http}/")
    shell.show(f"  builder    {plan.builder}")
    shell.show(f"  models     {', '.join(model.name for model in models)}")
    shell.show(f"  logs       {logs}")
    show_lines_to_try(plan.inference, plan.http or OPENAI, models)


def show_lines_to_try(inference: str, http: str, models: Sequence[ModelInfo]) -> None:
    """Print a line each for the command line, Python, curl and grpcurl."""
    model = models[-1].name
    flag = "" if inference == INFERENCE else f" --grpc {inference}"
    argument = "" if inference == INFERENCE else f'"{inference}"'
    shell.show("try", "bold")
    for line in (
        f"loramux chat {model}{flag}",
        "",
        f"""python -c 'import loramux; print(loramux.Client({argument}).complete("{model}", "Hi").text)'""",
        "",
        f"curl http://{http}/v1/chat/completions -H 'content-type: application/json' \\",
        f"""  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hi"}}]}}'""",
        "",
        f"""grpcurl -plaintext -d '{{"model": "{model}", "text": "Hi"}}' \\""",
        f"  {inference} loramux.inference.v1.InferenceService/Generate",
    ):
        shell.show(f"  {line}".rstrip())
