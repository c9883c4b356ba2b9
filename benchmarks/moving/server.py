"""A replica as a process, asked as its users do."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import httpx
import psutil

from benchmarks.moving.figures import memory_mb
from benchmarks.moving.forge import Forge
from benchmarks.moving.replica import BEGIN_S, ENDLESS, prompt
from benchmarks.serving import BASE, ROOT, end_process
from loramux import AsyncClient
from loramux.cli.local.tree import free_address
from loramux.records import Delta

LOOPBACK = "127.0.0.1:0"


class Server:
    """The inference service of a deployment, with both APIs."""

    def __init__(self, forge: Forge, deployment: str, cache: str = "cache", **settings: object) -> None:
        self.grpc, self.http = free_address(LOOPBACK), free_address(LOOPBACK)
        command = [sys.executable, "-m", "inference_service", "--store", f"file://{forge.work}/store"]
        command += ["--deployment", deployment, "--grpc", self.grpc, "--http", self.http]
        command += ["--local-root", str(BASE), "--local-root", str(forge.work)]
        usual = {"kv_memory_gb": "1.0", "cache_dir": str(forge.work / cache), "log_format": "json"}
        usual |= {name: str(value) for name, value in settings.items()}
        environment = os.environ | {f"LORAMUX_{name.upper()}": value for name, value in usual.items()}
        self.log = forge.work / f"{deployment}-{self.grpc.rpartition(':')[2]}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, cwd=ROOT, env=environment)  # noqa: S603 - ours
        self.pid = self._process.pid
        self._wait_until_ready()
        self.start_cpu_s = self.cpu_s
        """Processor time until then, which is valid on a busy machine too."""

    @property
    def loaded_s(self) -> float:
        """Return the seconds of loading that the service logged."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return float(next(line["seconds"] for line in lines if line.get("event") == "loaded"))

    @property
    def memory_mb(self) -> float:
        """Resident memory that is not a file's."""
        return memory_mb(self.pid)

    @property
    def cpu_s(self) -> float:
        """Seconds of processors that it has had."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + 180
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-2000:])
            try:
                if httpx.get(f"http://{self.http}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-2000:])

    def stop(self) -> None:
        """End it as an operator does."""
        end_process(self._process)


@contextmanager
def server(forge: Forge, deployment: str, cache: str = "cache", **settings: object) -> Iterator[Server]:
    """Run a replica for as long as the block takes."""
    running = Server(forge, deployment, cache, **settings)
    try:
        yield running
    finally:
        running.stop()


async def first_token_s(
    client: AsyncClient, model: str, tokens: list[int], new: int = 1, min_generation: int | None = None
) -> float:
    """Ask over gRPC; return the seconds to the first token."""
    began = time.perf_counter()
    events = client.generate(model, tokens, max_tokens=new, ignore_eos=True, min_generation=min_generation)
    found = 0.0
    async for event in events:
        if isinstance(event, Delta) and not found:
            found = time.perf_counter() - began
    return found


async def read_gaps(
    client: AsyncClient, model: str, tokens: list[int], gaps: list[float], begun: asyncio.Event
) -> None:
    """Read an endless stream until cancelled; note the seconds between its messages."""
    last = 0.0
    async for event in client.generate(model, tokens, max_tokens=ENDLESS, ignore_eos=True):
        if isinstance(event, Delta):
            now = time.perf_counter()
            if last:
                gaps.append(now - last)
            last = now
            begun.set()


@asynccontextmanager
async def streams(client: AsyncClient, models: Sequence[str]) -> AsyncIterator[list[float]]:
    """Run an endless stream per model; yield, when all have begun, the seconds between their messages."""
    gaps: list[float] = []
    begun = [asyncio.Event() for _ in models]
    tasks = [
        asyncio.create_task(read_gaps(client, model, prompt(), gaps, event))
        for model, event in zip(models, begun, strict=True)
    ]
    try:
        async with asyncio.timeout(BEGIN_S):
            await asyncio.gather(*(event.wait() for event in begun))
        yield gaps
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
