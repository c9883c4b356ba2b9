"""``loramux bench``: load on an inference service; a bar while it runs, figures per model at the end."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, Progress, TextColumn

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.cli.exits import Exit
from loramux.cli.serving import complete_model, no_such_model, unserved
from loramux.cli.shell import Later
from loramux.client import INFERENCE, AsyncClient
from loramux.records import GenerateOptions, Prompt
from loramux_bench.drive import BenchRun, ClientLoad, LoadPlan, drive
from loramux_bench.figures import Figures, Outcome, Percentiles, Report, report
from loramux_bench.plot import plot as draw, require_plot
from loramux_bench.workload import Workload, read_prompts, words_for
from loramux_shared.faults import SettingsInvalid
from loramux_shared.pages import page

DURATION_S = 10.0
CONCURRENCY = 8

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Model; repeatable; default: all, in turn.",
        autocompletion=complete_model,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        "--concurrency", metavar="N", min=1, help=f"Closed loop: N open requests; default {CONCURRENCY}."
    ),
]
Rate = Annotated[
    float | None, typer.Option("--rate", metavar="R", min=0.001, help="Open loop: R requests/s, Poisson.")
]
Requests = Annotated[
    int | None, typer.Option("--requests", metavar="N", min=1, help="Number of requests to send.")
]
Duration = Annotated[
    float | None,
    typer.Option(
        "--duration", metavar="S", min=0.1, help=f"Send for S s; default {DURATION_S:g}, or --requests."
    ),
]
PromptTokens = Annotated[
    int, typer.Option("--prompt-tokens", metavar="N", min=1, max=2**20, help="Tokens of a drawn prompt, about.")
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help=f"File, a prompt a line; see {page('extensions/bench/README.md')}."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens of an answer.")]
Eos = Annotated[bool, typer.Option("--eos", help="Let answers end earlier.")]
Warmup = Annotated[
    int | None, typer.Option("--warmup", metavar="N", min=0, help="Warm-up requests; default: one per model.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of prompts and arrivals.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="PNG file; needs matplotlib.")]


@shell.command
def bench(
    model: Models = None,
    grpc: shell.Grpc = INFERENCE,
    concurrency: Concurrency = None,
    rate: Rate = None,
    requests: Requests = None,
    duration: Duration = None,
    prompt_tokens: PromptTokens = 64,
    prompts: Prompts = None,
    max_tokens: MaxTokens = 64,
    eos: Eos = False,
    warmup: Warmup = None,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: shell.Json = False,
) -> None:
    """Measure a running service: its speed and waiting times.

    Example: loramux bench --model lora1 --model lora2 --concurrency 16
    """
    if rate is not None and concurrency is not None:
        raise SettingsInvalid("expected either --concurrency (closed loop) or --rate (open loop), found both")
    if plot is not None:
        require_plot(plot)
    plan = LoadPlan(
        concurrency=concurrency or CONCURRENCY,
        rate=rate,
        requests=requests,
        duration_s=duration if duration or requests else DURATION_S,
        options={"max_tokens": max_tokens, "ignore_eos": not eos},
    )
    prompts_read = read_prompts(prompts) if prompts else []
    workload, run = asyncio.run(_bench(grpc, model or [], prompts_read, prompt_tokens, seed, plan, warmup))
    if plot is not None:
        draw(run.outcomes, workload.models, plot)
    _tell(plan, workload, run, as_json)


async def _bench(
    address: str,
    requested: Sequence[str],
    prompts_read: Sequence[Prompt],
    prompt_tokens: int,
    seed: int,
    plan: LoadPlan,
    warmup: int | None,
) -> tuple[Workload, BenchRun]:
    async with AsyncClient(inference=address) as client:
        with shell.working(f"asking {address}"):
            models = await _models(client, requested)
            count = 0 if prompts_read else await words_for(client, models[0], prompt_tokens)
        workload = Workload(models, seed, count, prompts_read)
        await _warm_up(client, workload, plan.options, len(models) if warmup is None else warmup)
        view = BenchView(plan)
        with view.displayed():
            try:
                return workload, await drive(client, workload, plan, view.update)
            except asyncio.CancelledError:  # Ctrl-C; what was measured until then is shown
                return workload, BenchRun(view.outcomes, interrupted=True)


async def _models(client: AsyncClient, requested: Sequence[str]) -> list[str]:
    models = await client.models()
    served = [each.name for each in models]
    for name in requested:
        if unknown := unserved(name, served):
            raise no_such_model(unknown[0], served)
    return list(dict.fromkeys(requested)) or [each.name for each in models if each.generates]


async def _warm_up(client: AsyncClient, workload: Workload, options: GenerateOptions, requests: int) -> None:
    other = Workload(workload.models, workload.seed + 1, workload.words, workload.prompts)
    if requests:
        with shell.working(f"warming up with {requests} requests"):
            await drive(client, other, LoadPlan(CONCURRENCY, requests=requests, options=options))


def _tell(plan: LoadPlan, workload: Workload, run: BenchRun, as_json: bool) -> None:
    figures = report(run.outcomes, workload.models)
    if as_json:
        emit({"plan": plan, "seed": workload.seed, "report": figures, "client": run.load})
    else:
        show_report(figures)
        if run.load:
            show_load(run.load)
    if run.interrupted:
        raise typer.Exit(Exit.INTERRUPTED)
    if not figures.all.requests:
        raise typer.Exit(Exit.FAILED)


HEADERS = (
    *("model", "requests", "tokens/s"),
    *("first token p50/90/99 ms", "per token p50/90/99 ms", "whole p50/90/99 s"),
)
RIGHT = frozenset(HEADERS[1:])


class BenchView:
    """Shows on a terminal how far a run is."""

    def __init__(self, plan: LoadPlan) -> None:
        columns = (TextColumn("{task.description}"), BarColumn())
        self._bars = Progress(*columns, console=shell.err, transient=True) if shell.err.is_terminal else None
        self._plan = plan
        self._begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        self._tokens = self._errors = 0
        if self._bars:
            self._task = self._bars.add_task("sending", total=1.0)

    def displayed(self) -> AbstractContextManager[object]:
        """Draw the bar during a block that takes a while."""
        return Later(self._bars) if self._bars else nullcontext()

    def update(self, outcome: Outcome) -> None:
        """Count an outcome."""
        self.outcomes.append(outcome)
        self._errors += bool(outcome.error)
        self._tokens += outcome.tokens
        if self._bars:
            took = time.monotonic() - self._begin
            errors = f", {self._errors} failed" if self._errors else ""
            summary = f"{len(self.outcomes)} requests{errors}, {self._tokens / max(took, 1e-9):.0f} tokens/s"
            self._bars.update(self._task, completed=self._part(took), description=summary)

    def _part(self, took: float) -> float:
        """Return how much of the run is over: by requests or by time, whichever ends it first."""
        by_requests = len(self.outcomes) / self._plan.requests if self._plan.requests else 0.0
        by_time = took / self._plan.duration_s if self._plan.duration_s else 0.0
        return min(max(by_requests, by_time), 1.0)


def show_report(report: Report) -> None:
    """Print a line per model, and what failed."""
    if not (report.all.requests or report.all.errors):
        shell.say("stopped before the first answer was whole; nothing was measured")
        return
    lines = report.models if len(report.models) == 1 else (*report.models, report.all)
    shell.table(HEADERS, [_row(each) for each in lines], RIGHT)
    prompts = report.all.prompt_tokens / max(report.all.requests, 1)
    answers = report.all.tokens / max(report.all.requests, 1)
    shell.show(
        f"{report.seconds:.1f} s, {report.all.requests_per_s:.1f} requests/s; "
        f"on average {prompts:.0f} tokens asked, {answers:.0f} answered"
    )
    for each in report.models:
        for reason, failed in each.errors.items():
            shell.show(f"failed: {each.model}: {failed.count} times {reason}: {failed.message}", "red")


def show_load(load: ClientLoad) -> None:
    """Say on stderr how busy the client was."""
    late = f"{1e3 * (load.lag_s or 0.0):.0f} ms"
    load_text = f"the client took {load.cpu:.0%} of a core, and its event loop was {late} late (p90)"
    if load.is_bottleneck:
        shell.say(
            f"warning: {load_text}: it may have been the bottleneck. Lower the load, or use several clients",
            "yellow",
        )
    else:
        shell.say(load_text, "dim")


def _row(each: Figures) -> tuple[str, ...]:
    return (
        each.model,
        str(each.requests),
        f"{each.tokens_per_s:.1f}",
        _cell(each.first_token_s, 1e3, 0),
        _cell(each.per_token_s, 1e3, 1),
        _cell(each.latency_s, 1.0, 2),
    )


def _cell(values: Percentiles, scale: float, digits: int) -> str:
    numbers = (values.p50, values.p90, values.p99)
    return "/".join("-" if number is None else f"{scale * number:.{digits}f}" for number in numbers)


BENCH: Final = shell.Command(bench)
