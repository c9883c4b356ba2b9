"""Services as processes, and what their clients see of an answer."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

import httpx
import psutil

from benchmarks.forge import BASE, ROOT
from loramux import AsyncClient
from loramux.cli.local.tree import free_address
from loramux.records import Delta

ENDLESS: Final = 8000
"""New tokens of a stream whose end no round sees."""
BEGIN_S: Final = 120.0


def loramux(*arguments: str) -> None:
    """Run the command line."""
    command = [str(Path(sys.executable).parent / "loramux"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own command
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}")


class Service:
    """The builder or a replica on `work/store`; it serves when it is made, until its context ends."""

    def __init__(self, module: str, work: Path, *arguments: str, **settings: object) -> None:
        self.grpc, self.http = free_address(), free_address()
        command = [sys.executable, "-m", module, "--store", f"file://{work}/store", "--grpc", self.grpc]
        command += ["--local-root", str(BASE), "--local-root", str(work), *arguments]
        variables = {"log_format": "json", "http": self.http, **settings}
        environment = os.environ | {f"LORAMUX_{name.upper()}": str(value) for name, value in variables.items()}
        self._log = work / f"{self.grpc.rpartition(':')[2]}.log"
        with self._log.open("w") as log:
            self.process = psutil.Popen(command, stderr=log, cwd=ROOT, env=environment)
        try:
            loramux("health", self.grpc, "--wait", "120")
        except RuntimeError as failed:
            self.stop()
            raise RuntimeError(self._log.read_text()[-2000:]) from failed

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of its log about an event."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def stop(self) -> int:
        """Stop it as an operator does, and return its exit status."""
        return end_process(self.process)

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop it."""
        self.stop()


def replica_process(work: Path, deployment: str, **settings: object) -> Service:
    """Start a replica of a deployment."""
    usual = {"kv_memory_gb": 1.0, "cache_dir": work / "cache"}
    return Service("inference_service", work, "--deployment", deployment, **usual | settings)


def end_process(process: subprocess.Popen[bytes] | psutil.Popen) -> int:
    """Terminate a process, or kill it where it does not end; return its exit status."""
    process.terminate()
    try:
        return process.wait(60)
    except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
        process.kill()
        return process.wait()


Prompt = str | list[int]
Ask = Callable[[str, Prompt, int], AsyncIterator[int]]
"""Model, prompt and number of new tokens to the numbers of tokens in the answer's messages."""


def over_grpc(client: AsyncClient, **options: Any) -> Ask:
    """Ask a replica; nothing ends an answer before its last token."""

    async def ask(model: str, prompt: Prompt, new: int) -> AsyncIterator[int]:
        async for event in client.generate(model, prompt, max_tokens=new, ignore_eos=True, **options):
            if isinstance(event, Delta):
                yield len(event.token_ids)

    return ask


def over_http(client: httpx.AsyncClient, url: str) -> Ask:
    """Ask any OpenAI-compatible server, whose messages have a token each."""

    async def ask(model: str, prompt: Prompt, new: int) -> AsyncIterator[int]:
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        seen = 0
        async with client.stream("POST", f"{url.rstrip('/')}/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    message = json.loads(line[6:])
                    seen += bool(message["choices"])
                    yield 1 if message["choices"] else message["usage"]["completion_tokens"] - seen

    return ask


@dataclass
class Answer:
    """The moments at which the messages of an answer came."""

    began_s: float = field(default_factory=time.perf_counter)
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0

    async def read(self, messages: AsyncIterator[int]) -> Self:
        """Read an answer to its end."""
        async for tokens in messages:
            self.tokens += tokens
            if tokens > 0:
                self.times_s.append(time.perf_counter())
        return self

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.times_s[0] - self.began_s

    @property
    def token_s(self) -> float:
        """Seconds per token, the first one left out."""
        return (self.times_s[-1] - self.times_s[0]) / (self.tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between messages."""
        return [after - before for before, after in pairwise(self.times_s)]


async def first_tokens_s(ask: Ask, requests: Sequence[tuple[str, Prompt]], new: int, apart_s: float) -> float:
    """Ask one after the other, whether or not those before have ended; return the median to the first token."""
    under_way = []
    for model, prompt in requests:
        under_way.append(asyncio.ensure_future(Answer().read(ask(model, prompt, new))))
        await asyncio.sleep(apart_s)
    return statistics.median(answer.first_s for answer in await asyncio.gather(*under_way))


@asynccontextmanager
async def streams(ask: Ask, requests: Sequence[tuple[str, Prompt]]) -> AsyncIterator[list[Answer]]:
    """Run endless streams; yield when all have begun."""
    answers = [Answer() for _ in requests]
    reading = [
        asyncio.create_task(answer.read(ask(model, prompt, ENDLESS)))
        for answer, (model, prompt) in zip(answers, requests, strict=True)
    ]
    try:
        async with asyncio.timeout(BEGIN_S):
            while not all(answer.times_s for answer in answers):
                await asyncio.sleep(0.01)
        yield answers
    finally:
        for each in reading:
            each.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
