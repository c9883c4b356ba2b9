"""Throughput and time to the first token over gRPC, with a random model of 1B's shape."""

from __future__ import annotations

import asyncio
import itertools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.on_gpu.checkpoint import build_deployment, write_adapter, write_base
from benchmarks.on_gpu.model import LLAMA_1B, TINY
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.targets import OF_BASE
from benchmarks.service import replica_process
from loramux import AsyncClient

if TYPE_CHECKING:
    from loramux_bench.figures import Figures

RANK: Final = 16
SETTINGS: Final = {"native": "false", "kv_memory_gb": 4}
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


def run(run: Run) -> None:
    """Write a base and adapters, build them, serve them with and without adapters, and ask."""
    (plan,) = run.choose((FULL,), (QUICK,), (REHEARSAL,))
    with tempfile.TemporaryDirectory(prefix="loramux-gpu-") as folder, ExitStack() as stack:
        work = Path(folder)
        names = _prepare(run, plan, work)
        settings = SETTINGS | {"max_batch_seqs": max(plan.concurrencies)}
        with ThreadPoolExecutor() as pool:
            started = pool.map(lambda name: replica_process(work, name, **settings), ("bare", "full"))
        bare, full = map(stack.enter_context, started)
        asyncio.run(_ask_all(run, plan, bare.grpc, full.grpc, names))


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


async def _ask_all(run: Run, plan: Plan, bare: str, full: str, names: Sequence[str]) -> None:
    from loramux_bench.drive import LoadPlan, drive
    from loramux_bench.figures import report
    from loramux_bench.workload import Workload, words_for

    async with AsyncClient(inference=bare) as alone, AsyncClient(inference=full) as many:
        words = await words_for(alone, "base", plan.prompt_tokens)
        seeds = itertools.count()  # no prompt is met twice
        options: Any = {"max_tokens": plan.new_tokens, "ignore_eos": True}
        warm = LoadPlan(max(plan.concurrencies), requests=max(plan.concurrencies), options=options)
        loads = [(alone, 0, 0), *((many, len(names), active) for active in plan.actives)]
        for client, _, active in loads:
            await drive(client, Workload(_models(names, active), next(seeds), words), warm)
        base: dict[int, float] = {}
        for concurrency in plan.concurrencies:
            sent = LoadPlan(concurrency, duration_s=plan.duration_s, options=options)
            for client, loaded, active in loads:
                if run.left_s <= 0:
                    run.note(f"out of time before concurrency {concurrency}, {active} adapters")
                    return
                workload = Workload(_models(names, active), next(seeds), words)
                done = await drive(client, workload, sent)
                figures = report(done.outcomes, workload.models).all
                base.setdefault(concurrency, figures.tokens_per_s)
                point = {"loaded": loaded, "active": active, "concurrency": concurrency}
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
