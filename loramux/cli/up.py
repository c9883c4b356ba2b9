"""``loramux up``: builder and inference service of one deployment, as children of one process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loramux.cli import shell
from loramux.cli.build import build_and_show, read_deployment
from loramux.cli.look import until_serving
from loramux.cli.services import builder_command, engine_flags, inference_command
from loramux.cli.tree import ProcessTree, free_address, run_tree
from loramux.client import BUILDER, INFERENCE, AsyncClient
from loramux.records import ModelInfo
from shared.deployment import Deployment, SourceKind

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
    builder: shell.Builder = "",
    backend: shell.Backend = None,
    dtype: shell.Dtype = None,
    threads: shell.Threads = None,
) -> None:
    """Build a deployment file and serve it, here, until Ctrl-C.

    Addresses that are not given are 127.0.0.1:50051 and :50052, or free ports.

    Example: loramux up deployment.yaml
    """
    plan = Plan(
        deployment=read_deployment(file).deployment,
        store=store,
        builder=builder or free_address(BUILDER),
        inference=grpc or free_address(INFERENCE),
        engine=engine_flags(backend, dtype, threads),
    )
    run_tree(functools.partial(_up, plan=plan))


async def _up(tree: ProcessTree, plan: Plan) -> None:
    async with AsyncClient(inference=plan.inference, builder=plan.builder) as client:
        await start_builder(tree, plan)
        await build_and_show(client, plan.deployment)
        await start_inference(tree, plan)
        show_ready(plan, await client.models(), tree.folder)
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
    argv = inference_command(name, plan.store, plan.inference, plan.local_roots, plan.engine)
    with shell.step(f"inference service on {plan.inference}"):
        await tree.start("inference", argv)
        await until_serving(plan.inference)


async def keep(tree: ProcessTree) -> None:
    """Stay until a signal ends the tree."""
    tree.ready = True
    shell.say("serving until Ctrl-C", "dim")
    await asyncio.Event().wait()


def show_ready(plan: Plan, models: Sequence[ModelInfo], logs: Path) -> None:
    """Print where everything is, and what to try."""
    shell.show()
    shell.show("ready", "bold green")
    shell.show(f"  inference  {plan.inference}")
    shell.show(f"  builder    {plan.builder}")
    shell.show(f"  models     {', '.join(model.name for model in models)}")
    shell.show(f"  logs       {logs}")
    show_lines_to_try(plan.inference, models)


def show_lines_to_try(inference: str, models: Sequence[ModelInfo]) -> None:
    """Print a line each for the command line, Python and grpcurl."""
    model = models[-1].name
    flag = "" if inference == INFERENCE else f" --grpc {inference}"
    argument = "" if inference == INFERENCE else f'"{inference}"'
    shell.show("try", "bold")
    for line in (
        f"loramux chat {model}{flag}",
        "",
        f"""python -c 'import loramux; print(loramux.Client({argument}).complete("{model}", "Hi").text)'""",
        "",
        f"""grpcurl -plaintext -d '{{"model": "{model}", "text": "Hi"}}' \\""",
        f"  {inference} loramux.inference.v1.InferenceService/Generate",
    ):
        shell.show(f"  {line}".rstrip())
