"""Tokens per second and time to first token over gRPC, with adapters and without, beside a peer.

Eight random adapters (rank 16 on all seven projections) on the demo's base; prompts of 64 random words, 64 new
tokens each, greedy, end-of-sequence ignored; 16, 16 and 48 requests at concurrency 1, 8 and 32. Beside the
servers, in turn with them: their engine alone, and as the peer transformers + PEFT with a static mixed batch
and no server. Nothing is drafted unless LORAMUX_SPECULATIVE_TOKENS says so. Figures are medians over rounds; a
table is printed last, ratios beside their bars, and the exit status is 1 where one is missed.

    python -m benchmarks.serving --rounds 3
"""

import argparse
import asyncio
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.figures import machine
from benchmarks.forge import BASE, ROOT, build, make_adapters
from benchmarks.peer import Peer
from benchmarks.service import Answer, Ask, Service, over_grpc, replica_process
from loramux import AsyncClient

LOADS: Final = ((1, 16), (8, 16), (32, 48))
"""Concurrency and requests."""
WORDS: Final = 64
NEW_TOKENS: Final = 64
ADAPTERS: Final = 8


@dataclass(frozen=True)
class Figures:
    """One load on one contender."""

    tokens_per_s: float
    first_token_s: float = math.nan
    """Median; NaN where it is not measured."""


Run = Callable[[int, int, int], Awaitable[Figures]]
"""Concurrency, requests and seed to figures."""
Table = Mapping[str, Sequence[Figures]]
"""Figures by the contender's label, then by load."""


def prompts(count: int, seed: int) -> list[str]:
    """Return distinct prompts of ordinary words, so that no prefix is met twice."""
    draw = random.Random(seed)
    text = " ".join(path.read_text() for path in sorted((ROOT / "examples/data").glob("*.jsonl")))
    words = sorted({word for word in re.findall(r"[a-z]+", text) if len(word) > 2})
    return [" ".join(draw.choice(words) for _ in range(WORDS)) for _ in range(count)]


def run_of(ask: Ask, models: Sequence[str], *, decoding: bool = False) -> Run:
    """Ask a server for some models in turn, and keep so many requests open until all have ended.

    The rate is that of all tokens, or of those behind each answer's first one, by the median of their times.
    """

    async def run(concurrency: int, requests: int, seed: int) -> Figures:
        gate = asyncio.Semaphore(concurrency)

        async def one(index: int, prompt: str) -> Answer:
            async with gate:
                return await Answer().read(ask(models[index % len(models)], prompt, NEW_TOKENS))

        began = time.perf_counter()
        each = await asyncio.gather(*(one(*pair) for pair in enumerate(prompts(requests, seed))))
        took = time.perf_counter() - began
        if decoding:
            return Figures(concurrency / statistics.median(answer.token_s for answer in each))
        firsts = statistics.median(answer.first_s for answer in each)
        return Figures(sum(answer.tokens for answer in each) / took, firsts)

    return run


def done_by(peer: Peer, models: Sequence[str]) -> Run:
    """Have a peer do it."""

    async def run(concurrency: int, requests: int, seed: int) -> Figures:
        return Figures(*await peer.load(models, prompts(requests, seed), concurrency, NEW_TOKENS))

    return run


async def measure(
    contenders: Mapping[str, Run], rounds: int, loads: Sequence[tuple[int, int]] = LOADS
) -> dict[str, list[Figures]]:
    """Measure every load on all contenders in turn, round by round, so that all meet the same machine."""
    for run in contenders.values():
        await run(8, 16, 999)  # warm up
    table: dict[str, list[Figures]] = {label: [] for label in contenders}
    for load in loads:
        found: dict[str, list[Figures]] = {label: [] for label in contenders}
        for seed in range(rounds):
            for label, run in contenders.items():
                found[label].append(await run(*load, seed))
        for label, row in table.items():
            rates, firsts = (
                [each.tokens_per_s for each in found[label]],
                [each.first_token_s for each in found[label]],
            )
            row.append(Figures(statistics.median(rates), statistics.median(firsts)))
    return table


@dataclass(frozen=True)
class Bar:
    """The least tokens per second of one contender, relative to another."""

    what: str
    over: str
    under: str
    least: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Factors by load; 0: no bar."""

    def ratios(self, table: Table) -> list[float]:
        """Return what was found, by load."""
        pairs = zip(table[self.over], table[self.under], strict=True)
        return [over.tokens_per_s / under.tokens_per_s for over, under in pairs]


def report(table: Table, bars: Sequence[Bar]) -> int:
    """Print the table, and the ratios beside their bars; 1 when a bar is missed."""
    status = 0
    loads = [concurrency for concurrency, _ in LOADS]
    print(f"{'':<34}" + "".join(f" {f'tok/s @{load}':>11} {f'ttft @{load}':>10}" for load in loads))
    for label, row in table.items():
        firsts = (
            "-" if math.isnan(each.first_token_s) else f"{each.first_token_s * 1e3:.0f} ms" for each in row
        )
        cells = (f" {each.tokens_per_s:>11.0f} {first:>10}" for each, first in zip(row, firsts, strict=True))
        print(f"{label:<34}{''.join(cells)}")
    for bar in bars:
        if bar.over in table and bar.under in table:
            ratios = bar.ratios(table)
            least = f"   bar {' / '.join(f'{each:g}' for each in bar.least)}" if any(bar.least) else ""
            print(f"{bar.what + ':':<46}{' / '.join(f'{each:.2f}' for each in ratios)}{least}")
            status |= any(found < bound for found, bound in zip(ratios, bar.least, strict=True))
    return status


LORAMUX, BASE_REQUESTS, ENGINE = "loramux, adapters", "loramux, base requests", "its engine alone, adapters"
NONE_LOADED = "loramux, no adapters loaded"
PEFT, TRANSFORMERS = "transformers + PEFT, adapters", "transformers, no adapters"
BARS: Final = (
    Bar("adapters / transformers + PEFT", LORAMUX, PEFT, (3.2, 5.5, 5.0)),
    Bar("base requests / transformers' static batch", BASE_REQUESTS, TRANSFORMERS, (2.2, 1.8, 1.7)),
    Bar("adapters / base requests, same server", LORAMUX, BASE_REQUESTS, (0.92, 0.85, 0.88)),
    Bar("over gRPC / engine alone, adapters", LORAMUX, ENGINE, (0.8, 0.8, 0.8)),
    Bar("base requests / no adapters loaded", BASE_REQUESTS, NONE_LOADED),
)


async def _measure(work: Path, names: Sequence[str], full: Service, bare: Service, rounds: int) -> Table:
    async with AsyncExitStack() as stack:
        many = over_grpc(await stack.enter_async_context(AsyncClient(inference=full.grpc)))
        none = over_grpc(await stack.enter_async_context(AsyncClient(inference=bare.grpc)))
        engine = stack.enter_context(Peer("engine", f"file://{work}/store", "full", BASE))
        contenders = {
            LORAMUX: run_of(many, names),
            BASE_REQUESTS: run_of(many, ["base"]),
            NONE_LOADED: run_of(none, ["base"]),
            ENGINE: done_by(engine, names),
        } | transformers(stack, work, names)
        return await measure(contenders, rounds)


def transformers(stack: AsyncExitStack, work: Path, names: Sequence[str]) -> dict[str, Run]:
    """Start transformers with PEFT, and alone."""
    found = {}
    for label, some in ((PEFT, names), (TRANSFORMERS, ())):
        found[label] = done_by(stack.enter_context(Peer("peft", BASE, work / "adapters", *some)), some)
    return found


def speed() -> str:
    """Return the speed of the memory, by one pass over a large array, best of ten, and what it allows."""
    data, best = torch.ones(256 * 2**20 // 4), 0.0
    for _ in range(10):
        began = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - began))
    weights = sum(path.stat().st_size for path in BASE.glob("*.safetensors"))
    return f"{weights / 1e6:.0f} MB of weights at {best / 1e9:.1f} GB/s: {weights / best * 1e3:.1f} ms a step"


def main() -> int:
    """Measure, print the table, and tell by the status whether every bar was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # With drafts, it would be compared how often texts repeat themselves, which each adapter's do otherwise.
    os.environ.setdefault("LORAMUX_SPECULATIVE_TOKENS", "0")
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        work = Path(folder)
        names = make_adapters(work, ADAPTERS)
        build(work, "full", names)
        build(work, "bare", [])
        with replica_process(work, "full") as full, replica_process(work, "bare") as bare:
            table = asyncio.run(_measure(work, names, full, bare, options.rounds))
            [loaded] = full.logged("loaded")
    print(machine(), f"{loaded['adapters']} adapters loaded, {loaded['operations']}", speed(), "", sep="\n")
    return report(table, BARS)


if __name__ == "__main__":
    sys.exit(main())
