"""``loramux bench``: load on an OpenAI-compatible server, or the report of an earlier run."""

import asyncio
import math
import signal
import ssl
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import httpx
import typer
from pydantic import TypeAdapter, ValidationError

from loramux.cli import shell
from loramux.cli.documents import emit_line
from loramux.cli.exits import Exit
from loramux.connection import Credentials
from loramux_bench.comparison import compare
from loramux_bench.drive import Driver
from loramux_bench.figures import report
from loramux_bench.page import html_page
from loramux_bench.records import Run
from loramux_bench.server import CHAT, Server, split_url
from loramux_bench.text import BenchView, show_comparison, show_report
from loramux_bench.workload import (
    FEW_WORDS,
    MORE_WORDS,
    WORDS,
    BenchRequest,
    DatasetPrompt,
    Plan,
    PromptFit,
    Workload,
    read_dataset,
    read_lengths,
    read_popularity,
)
from loramux_shared.faults import RequestInvalid, SettingsInvalid

URL = "http://127.0.0.1:8000"
DURATION_S = 10.0
WARMUPS = 4
CONNECT_S = 10.0
SILENCE_S = 600.0
"""Seconds without a byte after which a request has failed."""

INTERRUPTED: Final = "Ctrl-C; requests that were open then are left out"


def positive(value: float | None) -> float | None:
    """Return the number of an option; raise BadParameter where it is not above 0, or infinite."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter("expected a number above 0")
    return value


above_0 = partial(typer.Option, callback=positive)


@shell.command
def bench(
    target: Annotated[str, typer.Argument(metavar="URL", hidden=True)] = URL,
    baseline: Annotated[Path | None, typer.Argument(metavar="BASELINE", hidden=True)] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Model; repeatable; default: all listed ones.")
    ] = None,
    lora_distribution: Annotated[
        str, typer.Option(metavar="D", help="uniform, zipf:1, churn:1:100.")
    ] = "uniform",
    request_rate: Annotated[
        float | None, above_0(metavar="R", help="Open loop: requests per second, Poisson.")
    ] = None,
    burstiness: Annotated[float, above_0(metavar="B", help="Of an open loop: below 1 in bursts.")] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Open requests; of a closed loop 8.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of requests to send.")
    ] = None,
    duration: Annotated[float | None, above_0(metavar="S", help="Seconds of sending; default 10.")] = None,
    input_len: Annotated[
        str, typer.Option(metavar="L", help="Prompts: 64, 9-99, lognormal:64:0.5 tokens.", show_default=False)
    ] = "64",
    output_len: Annotated[str, typer.Option(metavar="L", help="Answers, likewise.")] = "64",
    dataset_path: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, text or JSON a line.")
    ] = None,
    eos: Annotated[bool, typer.Option("--eos", help="Let answers end earlier (no ignore_eos).")] = False,
    num_warmups: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests before, to the base.")
    ] = WARMUPS,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the load.")] = 0,
    ttft_limit: Annotated[
        float | None, above_0(metavar="MS", help="Goodput: longest time to first token.")
    ] = None,
    tpot_limit: Annotated[
        float | None, above_0(metavar="MS", help="Goodput: longest time per token after it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Report: a page with plots.")] = None,
    as_json: shell.Json = False,
) -> None:
    """\b
    Measure an OpenAI-compatible server. Example: loramux bench http://host:8000
    URL and BASELINE may be files that --json wrote, for a report or a comparison.
    """
    plan = Plan(
        url=target,
        models=tuple(model or ()),
        lora_distribution=lora_distribution,
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        num_prompts=num_prompts,
        duration_s=duration if duration or num_prompts else DURATION_S,
        input_len=input_len,
        output_len=output_len,
        dataset_path=str(dataset_path) if dataset_path else None,
        ignore_eos=not eos,
        seed=seed,
        ttft_limit_ms=ttft_limit,
        tpot_limit_ms=tpot_limit,
    )
    read_lengths(input_len, "--input-len")
    read_lengths(output_len, "--output-len")
    read_popularity(lora_distribution)
    if html and not html.resolve().parent.is_dir():
        raise SettingsInvalid(f"--html={html}: expected a file in a folder that exists")
    other = read_run(baseline) if baseline else None
    if Path(target).is_file():
        _show(read_run(Path(target)), other, html, as_json)
        return
    run = _measure(plan, num_warmups)
    _show(run, other, html, as_json)
    if run.ended_by:
        raise typer.Exit(Exit.INTERRUPTED if run.ended_by == INTERRUPTED else Exit.UNAVAILABLE)
    if all(each.error for each in run.records):
        raise typer.Exit(Exit.FAILED)


def read_run(path: Path) -> Run:
    """Read what ``--json`` printed; raise RequestInvalid where a file is none."""
    try:
        return TypeAdapter(Run).validate_json(path.read_bytes())
    except OSError as error:
        raise RequestInvalid(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise RequestInvalid(f"{path} is no run: expected what loramux bench --json prints") from error


def _measure(plan: Plan, num_warmups: int) -> Run:
    address, endpoint = split_url(plan.url)
    dataset = read_dataset(Path(plan.dataset_path)) if plan.dataset_path else []
    if not endpoint and any(not isinstance(each.prompt, str) for each in dataset):
        endpoint = CHAT
    credentials = Credentials()
    trusted = ssl.create_default_context(cafile=credentials.tls_ca) if credentials.tls_ca else True

    async def measure() -> Run:
        async with httpx.AsyncClient(
            base_url=address,
            headers={"accept-encoding": "identity", **dict(credentials.metadata)},
            verify=trusted,
            timeout=httpx.Timeout(SILENCE_S, connect=CONNECT_S, pool=None),
            limits=httpx.Limits(max_connections=None),
        ) as http:
            return await run_plan(Server(http, endpoint, plan.ignore_eos), plan, dataset, num_warmups)

    return asyncio.run(measure())


async def run_plan(server: Server, plan: Plan, dataset: list[DatasetPrompt], num_warmups: int) -> Run:
    """Ask a server for its models, warm it up, and send it a plan; Ctrl-C ends it with what there is."""
    with shell.working(f"asking {server.http.base_url}"):
        models, first = await server.models(plan.models)
        plan = replace(plan, models=models)
        counts = [await server.try_out(_probe(first, count)) for count in (FEW_WORDS, MORE_WORDS)]
    fit = PromptFit.from_counts(*(each.prompt_tokens for each in counts))
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = Run(plan, started, warmed=(first,), num_warmups=num_warmups + len(counts))
    if num_warmups:
        before = replace(plan, models=(first,), seed=-1 - plan.seed, num_prompts=num_warmups)
        before = replace(before, request_rate=None, duration_s=None)
        with shell.working(f"warming up with {num_warmups} requests"):
            await Driver(server, Workload(before, fit, dataset), Run(before)).drive()
    view = BenchView(plan)
    sending = asyncio.ensure_future(Driver(server, Workload(plan, fit, dataset), run, view.update).drive())
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, sending.cancel)
    with view.display():
        try:
            await sending
        except asyncio.CancelledError:
            run.ended_by = INTERRUPTED
    return run


def _probe(model: str, count: int) -> BenchRequest:
    return BenchRequest(0, model, " ".join(WORDS[:count]), 1)


def _show(run: Run, baseline: Run | None, html: Path | None, as_json: bool) -> None:
    figures = report(run)
    comparisons = compare(run, baseline) if baseline else []
    if as_json:
        emit_line({"report": figures, "comparison": comparisons} | vars(run))
    else:
        show_report(figures)
        if baseline:
            show_comparison(run, baseline, comparisons)
    if html:
        html.write_text(html_page(run, figures, baseline, comparisons), encoding="utf-8")
