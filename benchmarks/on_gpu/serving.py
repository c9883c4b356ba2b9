"""Throughput and time to the first token over gRPC, with a random model of 1B's shape."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.on_gpu.checkpoint import build_deployment, write_adapter, write_base
from benchmarks.on_gpu.machine import ROOT
from benchmarks.on_gpu.model import LLAMA_1B, TINY
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.targets import OF_BASE
from benchmarks.serving import end_process
from loramux import AsyncClient

if TYPE_CHECKING:
    from loramux_bench.figures import Figures

RANK: Final = 16
READY: Final = "inference service ready"
POLL_S: Final = 0.2
SETTINGS: Final = {"LORAMUX_NATIVE": "false", "LORAMUX_KV_MEMORY_GB": "4"}
"""The same cache on every card; and in a rehearsal nothing is compiled."""


@dataclass(frozen=True)
class Plan:
    """The requests."""

    shape: dict[str, Any]
    adapters: int
    actives: tuple[int, ...]
    """Adapters that requests take in turn; 0: requests for the base."""
    concurrencies: tuple[int, ...]
    duration_s: float
    prompt_tokens: int
    new_tokens: int
    max_seq_len: int


FULL: Final = Plan(LLAMA_1B, 16, (0, 1, 8, 16), (1, 32, 128), 3.0, 128, 128, 1024)
QUICK: Final = Plan(LLAMA_1B, 8, (0, 8), (1, 32), 3.0, 128, 64, 1024)
REHEARSAL: Final = Plan(TINY, 2, (0, 2), (2,), 0.1, 6, 3, 64)


class ServerEnded(RuntimeError):
    """The inference service did not come up."""


@dataclass(frozen=True)
class Server:
    """An inference service that answers."""

    address: str
    loaded: int
    """Adapters."""


def run(run: Run) -> None:
    """Write a base and adapters, build them, serve them with and without adapters, and ask."""
    (plan,) = run.choose((FULL,), (QUICK,), (REHEARSAL,))
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-") as folder, ExitStack() as stack:
        work = Path(folder)
        names = _prepare(run, plan, work)
        starting = [stack.enter_context(_started(work, name, plan)) for name in ("bare", "full")]
        ends_s = time.monotonic() + run.left_s
        bare, full = (Server(_wait(each, ends_s), n) for each, n in zip(starting, (0, len(names)), strict=True))
        asyncio.run(_ask_all(run, plan, bare, full, names))


def _prepare(run: Run, plan: Plan, work: Path) -> list[str]:
    """Return the names of the adapters of deployment ``full``; ``bare`` has none."""
    began = time.monotonic()
    from loramux_bench.workload import WORDS

    write_base(work / "base", plan.shape, run.device.where, WORDS)
    names = [f"lora{index}" for index in range(plan.adapters)]
    for name in names:
        write_adapter(work / "adapters" / name, plan.shape, RANK, run.device.where)
    build_deployment(work, "full", names, plan.max_seq_len)
    build_deployment(work, "bare", [], plan.max_seq_len)
    run.say(f"a random base and {len(names)} adapters built in {time.monotonic() - began:.1f} s")
    return names


@dataclass(frozen=True)
class _Starting:
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def _started(work: Path, deployment: str, plan: Plan) -> Iterator[_Starting]:
    """Start a service on a free port; it ends with the context."""
    log = work / f"{deployment}.log"
    command = [sys.executable, "-m", "inference_service", "--deployment", deployment, "--grpc", "127.0.0.1:0"]
    command += ["--store", f"file://{work}/store", "--local-root", str(work)]
    most = {"LORAMUX_MAX_BATCH_SEQS": str(max(plan.concurrencies)), "LORAMUX_CACHE_DIR": str(work / "cache")}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, cwd=ROOT, env=os.environ | SETTINGS | most)  # noqa: S603
    try:
        yield _Starting(process, log)
    finally:
        end_process(process)


def _wait(starting: _Starting, ends_s: float) -> str:
    """Return the address of a service once it answers.

    Raises:
        ServerEnded: it ended, or is not ready in time; with the end of its log.
    """
    while True:
        text = starting.log.read_text()
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
        ready = next((line for line in lines if line["event"] == READY), None)
        if ready is not None:
            return str(ready["grpc"])
        if starting.process.poll() is not None or time.monotonic() > ends_s:
            end = "\n".join(text.splitlines()[-15:])
            raise ServerEnded(f"the service is not ready; exit status {starting.process.poll()}:\n{end}")
        time.sleep(POLL_S)


async def _ask_all(run: Run, plan: Plan, bare: Server, full: Server, names: Sequence[str]) -> None:
    from loramux_bench.drive import LoadPlan, drive
    from loramux_bench.figures import report
    from loramux_bench.workload import Workload, words_for

    async with AsyncClient(inference=bare.address) as alone, AsyncClient(inference=full.address) as many:
        words = await words_for(alone, "base", plan.prompt_tokens)
        seeds = itertools.count()  # no prompt is met twice
        options: Any = {"max_tokens": plan.new_tokens, "ignore_eos": True}
        warm = LoadPlan(max(plan.concurrencies), requests=max(plan.concurrencies), options=options)
        loads = [(alone, bare, 0), *((many, full, active) for active in plan.actives)]
        for client, _, active in loads:
            await drive(client, Workload(_models(names, active), next(seeds), words), warm)
        base: dict[int, float] = {}
        for concurrency in plan.concurrencies:
            sent = LoadPlan(concurrency, duration_s=plan.duration_s, options=options)
            for client, server, active in loads:
                if run.left_s <= 0:
                    run.note(f"out of time before concurrency {concurrency}, {active} adapters")
                    return
                workload = Workload(_models(names, active), next(seeds), words)
                done = await drive(client, workload, sent)
                figures = report(done.outcomes, workload.models).all
                base.setdefault(concurrency, figures.tokens_per_s)
                point = {"loaded": server.loaded, "active": active, "concurrency": concurrency}
                busy = done.load is not None and done.load.is_bottleneck
                _put(run, point, figures, base[concurrency], busy=busy)


def _models(names: Sequence[str], active: int) -> Sequence[str]:
    return names[:active] or ["base"]


def _put(run: Run, point: Mapping[str, int | str], done: Figures, base: float, *, busy: bool) -> None:
    hidden = math.nan if run.device.rehearses else 1.0
    first = done.first_token_s
    run.add(
        point,
        {
            "requests": done.requests,
            "failed": sum(each.count for each in done.errors.values()),
            "tokens/s": done.tokens_per_s * hidden,
            OF_BASE: done.tokens_per_s / base * hidden if base else None,
            "ttft p50 ms": None if first.p50 is None else first.p50 * 1e3 * hidden,
            "ttft p99 ms": None if first.p99 is None else first.p99 * 1e3 * hidden,
            "client": "rehearsal" if run.device.rehearses else "busy" if busy else "idle",
        },
    )
    for reason, failures in done.errors.items():
        run.note(f"{failures.count} requests failed with {reason}: {failures.message}")
