"""``loramux run-batch``: the requests of a file, against a replica or in this process."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from loramux.cli import shell
from loramux.cli.documents import emit
from loramux.connection import Credentials
from loramux_shared.faults import RequestInvalid, SettingsInvalid

if TYPE_CHECKING:
    from loramux_batches.batch import Batch, Counts

URL = "http://127.0.0.1:8000"
CONCURRENCY = 64

Source = Annotated[Path, typer.Argument(metavar="IN", help="Requests (JSONL).", show_default=False)]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Answers (JSONL).", show_default=False)]
Url = Annotated[str, typer.Option("--url", metavar="URL", help="Replica or proxy.")]
File = Annotated[
    Path | None,
    typer.Option("--deployment", metavar="FILE", help="Deployment file to load here instead of --url."),
]
Concurrency = Annotated[int, typer.Option("--concurrency", metavar="N", min=1, help="Most open requests.")]


@shell.command
def run_batch(
    source: Source,
    output: Output,
    url: Url = URL,
    deployment: File = None,
    concurrency: Concurrency = CONCURRENCY,
    as_json: shell.Json = False,
) -> None:
    """Answer the requests of a file in OpenAI's batch format.

    A run that was interrupted goes on where it ended: requests whose answers are in
    OUT are not sent again. A refused request is an answer too; its status says why.

    Example: loramux run-batch requests.jsonl answers.jsonl
    """
    missing = [name for name in ("httpx", *(["torch"] if deployment else [])) if find_spec(name) is None]
    if missing:
        needs = f"run-batch needs {' and '.join(missing)}, not installed here"
        raise SettingsInvalid(f"{needs}: pip install 'loramux[{'offline' if deployment else 'batches'}]'")
    from loramux_batches.batch import Batch, unanswered

    if not re.match(r"https?://[^/:]", url):
        raise SettingsInvalid(f"--url={url}: expected http://HOST:PORT or https://HOST:PORT")
    try:
        batch = Batch(source, output)
    except OSError as error:
        raise RequestInvalid(f"cannot read {error.filename}: {error.strerror}.") from error
    with batch.alone(), _loaded(deployment) if deployment else nullcontext() as llm:
        counts = _run(batch, url, llm, concurrency)
    if as_json:
        emit({"total": counts.total, "answered": counts.done, "refused": counts.refused})
    else:
        shell.show(f"{counts.done} of {counts.total} requests answered, {counts.refused} refused: {output}")
    if counts.left:
        raise unanswered(counts, output)


def _loaded(deployment: Path) -> Any:
    import loramux

    with shell.step(f"loading {deployment}"):
        return loramux.LLM(deployment)


def _run(batch: Batch, url: str, llm: Any, concurrency: int) -> Counts:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=shell.err, transient=True) as progress:
        bar = progress.add_task("requests", total=batch.counts.total, completed=batch.counts.done)
        work = _ask(batch, url, llm, concurrency, lambda: progress.advance(bar))
        return llm.run(work) if llm else asyncio.run(work)


async def _ask(batch: Batch, url: str, llm: Any, concurrency: int, on_answer: Callable[[], None]) -> Counts:
    import httpx

    transport = None
    if llm is not None:
        from inference_service.api.http.app import create_app

        transport = httpx.ASGITransport(create_app(llm.service))
    credentials = Credentials()
    trusted = ssl.create_default_context(cafile=credentials.tls_ca) if credentials.tls_ca else True
    async with httpx.AsyncClient(
        transport=transport,
        base_url=url,
        headers=dict(credentials.metadata),
        verify=trusted,
        timeout=None,  # noqa: S113 - an answer takes as long as it takes
        limits=httpx.Limits(max_connections=concurrency),
    ) as http:
        return await batch.run(http, concurrency, on_answer)
