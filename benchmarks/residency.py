"""Adapters that come and go, and long prompts: what a replica promises of them, measured beside its bars.

Sections are named on the command line; without a name, all are measured. The base is the demo's, adapters
have rank 16 on all seven modules in bfloat16, replicas listen on 127.0.0.1. Most figures are ratios of two
sides that were measured in turn, so that a busy moment hits both; a figure of a machine that does much else
is worth little. The exit status is 1 when a bar is missed.

    python -m benchmarks.residency
    python -m benchmarks.residency turns churn --rounds 5
"""

import argparse
import asyncio
import itertools
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from benchmarks.figures import Figure, formatted, percentile, ratio
from benchmarks.forge import Forge
from benchmarks.replica import Replica, bank_gb, prompt, replica
from benchmarks.service import (
    Answer,
    Ask,
    Service,
    first_tokens_s,
    loramux,
    over_grpc,
    replica_process,
    streams,
)
from loramux import AsyncClient

_numbers = itertools.count(1)
Use = Callable[[str], Awaitable[float]]
"""Use a model; seconds to the first token."""


async def turns(forge: Forge, rounds: int) -> list[Figure]:
    """Measure 8 streams that ask 16 adapters in turn, on a replica with 8 places and on one with 16.

    With the least recently used leaving first this is the worst order there is: nearly every request meets an
    adapter that has just left.
    """
    names = forge.deploy("turns", 16)

    async def first_s(each: Replica, requests: int) -> float:
        turn = itertools.islice(itertools.cycle(names), requests)

        async def stream() -> list[float]:
            return [await each.first_s(name, new=16) for name in turn]

        firsts = await asyncio.gather(*(stream() for _ in range(8)))
        return statistics.median(itertools.chain(*firsts))

    async with (
        replica(forge, "turns", adapter_memory_gb=bank_gb(8)) as tight,
        replica(forge, "turns", adapter_memory_gb=bank_gb(16)) as wide,
    ):
        firsts: dict[Replica, list[float]] = {tight: [], wide: []}
        for each in firsts:
            await first_s(each, 16)
        before = tight.loads
        for _ in range(rounds):
            for each, found in firsts.items():
                found.append(await first_s(each, 48))
        loads = (tight.loads - before) / (rounds * 48)
    note = f"8 places {formatted(firsts[tight], 1e3)}, {loads:.2f} loads a request; "
    note += f"all resident {formatted(firsts[wide], 1e3, 'ms')}"
    return [Figure("p50 time to first token, 8 places / all resident", ratio(*firsts.values()), "x", 1.5, note)]


STEADY: Final = 4
"""Adapters of the streams that loads and evictions must not disturb."""
PLACES: Final = 12
ROUND_S: Final = 4.0


async def churn(forge: Forge, rounds: int) -> list[Figure]:
    """Measure 8 streams while 10 adapters a second are loaded and evicted, and while as many are resident.

    What loads is a request for one token of one adapter after the other; without loads the same requests name
    resident adapters, so that the rows that they add to steps are on both sides. The engine's side is seen on a
    replica in this process, between the ends of its steps; the client's over gRPC, between messages.
    """
    names = forge.deploy("churn", PLACES + 24)
    steady = [(names[number % STEADY], prompt()) for number in range(8)]
    bank = bank_gb(PLACES)
    async with replica(forge, "churn", adapter_memory_gb=bank) as local, streams(local.ask, steady):

        async def steps_s(some: Sequence[str]) -> list[float]:
            with local.steps() as steps:
                async with _using(local.first_s, some):
                    await asyncio.sleep(ROUND_S)
            return steps.gaps_s

        figures = await _gaps("at the engine", names, rounds, local.first_s, steps_s)
    with replica_process(forge.work, "churn", adapter_memory_gb=bank, stream_interval_ms=0) as running:
        async with AsyncClient(inference=running.grpc) as client, streams(over_grpc(client), steady) as answers:
            use = _use_over_grpc(client)

            async def messages_s(some: Sequence[str]) -> list[float]:
                for answer in answers:
                    answer.times_s.clear()
                async with _using(use, some):
                    await asyncio.sleep(ROUND_S)
                return [gap for answer in answers for gap in answer.gaps_s]

            return figures + await _gaps("at a client over gRPC", names, rounds, use, messages_s)


async def _gaps(
    where: str,
    names: Sequence[str],
    rounds: int,
    use: Use,
    gaps_s: Callable[[Sequence[str]], Awaitable[list[float]]],
) -> list[Figure]:
    """Measure gaps with loads and without, in turn; each side begins a round in turn, for contexts grow."""
    kinds = {"resident": names[STEADY:PLACES], "cold": names[PLACES:]}
    p99: dict[str, list[float]] = {"cold": [], "resident": []}
    first = percentile(await gaps_s(kinds["cold"]), 0.99)
    for number in range(rounds):
        for kind in sorted(kinds, reverse=number % 2 == 0):
            if kind == "resident":
                await asyncio.gather(*map(use, kinds[kind]))  # they may have left meanwhile
            p99[kind].append(percentile(await gaps_s(kinds[kind]), 0.99))
    note = f"with {formatted(p99['cold'], 1e3)}; without {formatted(p99['resident'], 1e3, 'ms')}"
    return [
        Figure(
            f"p99 between tokens {where}, loads / none", ratio(p99["cold"], p99["resident"]), "x", 1.25, note
        ),
        Figure(f"p99 between tokens {where}, first uses", first * 1e3, "ms"),
    ]


@asynccontextmanager
async def _using(use: Use, names: Sequence[str]) -> AsyncIterator[None]:
    """Have 10 uses a second begin, whether or not those before have ended."""
    under_way: set[asyncio.Task[float]] = set()

    async def drive() -> None:
        for name in itertools.cycle(names):
            under_way.add(asyncio.ensure_future(use(name)))
            await asyncio.sleep(0.1)

    driving = asyncio.create_task(drive())
    try:
        yield
    finally:
        driving.cancel()
        await asyncio.gather(*under_way)


def _use_over_grpc(client: AsyncClient, **options: Any) -> Use:
    async def use(name: str) -> float:
        return (await Answer().read(over_grpc(client, **options)(name, prompt(), 1))).first_s

    return use


async def registered(forge: Forge, rounds: int) -> list[Figure]:
    """Measure a step with 2,000 registered adapters, 8 of them active, against one with 8 registered.

    Only the active ones have bundles. The bar is held against the processor time of the engine's thread, which
    is valid on a busy machine too.
    """
    names = forge.deploy("few", 8)
    forge.deploy("many", 8, 2000)
    found: dict[str, list[float]] = {"few": [], "many": []}
    settings = {"adapter_memory_gb": bank_gb(8), "preload": 8}
    async with replica(forge, "few", **settings) as few, replica(forge, "many", **settings) as many:
        for _ in range(2 * rounds):
            for deployment, local in {"few": few, "many": many}.items():
                async with streams(local.ask, [(name, prompt()) for name in names]):
                    with local.steps() as steps:
                        while len(steps.cpu_s) < 60:
                            await asyncio.sleep(0.05)
                found[deployment].append(statistics.median(steps.cpu_s))
    note = f"{formatted(found['many'], 1e3)}; with 8 {formatted(found['few'], 1e3, 'ms of CPU')}"
    best = min(found["many"]) / min(found["few"])  # what others do to a processor only adds
    return [Figure("step, 2,000 / 8 registered, best rounds", best, "x", 1.02, note)]


async def fair(forge: Forge, rounds: int) -> list[Figure]:
    """Measure first tokens of 20 models that ask once, while another's 64 endless streams take all seats.

    Compared with the same 20 on a server with nothing else to do.
    """
    hog, *others = forge.deploy("fair", 21)
    settings: dict[str, Any] = {"adapter_memory_gb": bank_gb(21), "preload": 21, "max_batch_seqs": 64}
    found: dict[str, tuple[list[float], list[float]]] = {"in this process": ([], []), "over gRPC": ([], [])}

    async def both(where: str, ask: Ask) -> None:
        async def first_s() -> float:
            return await first_tokens_s(ask, [(name, prompt()) for name in others], new=4, apart_s=0.25)

        beside, idle = found[where]
        idle.append(await first_s())
        async with streams(ask, [(hog, prompt()) for _ in range(64)]):
            beside.append(await first_s())

    for _ in range(rounds):
        async with replica(forge, "fair", **settings) as local:
            await both("in this process", local.ask)
        with replica_process(forge.work, "fair", **settings) as running:
            async with AsyncClient(inference=running.grpc) as client:
                await both("over gRPC", over_grpc(client))
    return [
        Figure(
            f"p50 first token of 20 {where}, beside streams / idle",
            ratio(beside, idle),
            "x",
            2.0,
            f"{formatted(beside, 1e3)}; idle {formatted(idle, 1e3, 'ms')}",
        )
        for where, (beside, idle) in found.items()
    ]


async def push(forge: Forge, rounds: int) -> list[Figure]:
    """Measure from the beginning of PutAdapter to the first token of a request that asks for its generation."""
    forge.deploy("push", 1)
    times: list[float] = []
    published: list[float] = []
    versions = _versions(forge)
    with (
        Service("builder_service", forge.work) as builder,
        replica_process(forge.work, "push", builder=builder.grpc, adapter_memory_gb=bank_gb(16)) as running,
    ):
        async with AsyncClient(inference=running.grpc, builder=builder.grpc) as client:
            for _ in range(1 + 8 * rounds):
                files = next(versions)
                began = time.perf_counter()
                pushed = await client.push("push", "pushed", files)
                published.append(1e3 * (time.perf_counter() - began))
                await _use_over_grpc(client, min_generation=pushed.generation)("pushed")
                times.append(1e3 * (time.perf_counter() - began))
    first, *rest = times
    note = f"{formatted(rest)}; published {statistics.median(published[1:]):.0f}; the very first {first:.0f} ms"
    return [Figure("push to the first token, median", statistics.median(rest), "ms", 300.0, note)]


async def add(forge: Forge, rounds: int) -> list[Figure]:
    """Measure `loramux add` to a deployment of 500 and to one of one, in turn."""
    forge.deploy("one", 1)
    forge.deploy("among", 1, 500)
    versions = _versions(forge)
    took: dict[str, list[float]] = {"among": [], "one": []}
    with Service("builder_service", forge.work) as builder:
        for number in range(rounds + 1):
            for deployment, seconds in took.items():
                folder = forge.work / "added" / f"{deployment}-{number}"
                folder.mkdir(parents=True)
                for name, content in next(versions).items():
                    (folder / name).write_bytes(content)
                began = time.perf_counter()
                where = ("--source", "LOCAL", "--deployment", deployment, "--builder", builder.grpc)
                loramux("add", "added", str(folder), *where)
                seconds.append(time.perf_counter() - began)
    for seconds in took.values():
        del seconds[0]  # what a builder does once
    note = f"{formatted(took['among'])}; to one {formatted(took['one'], unit='s')}"
    return [Figure("loramux add among 500 / to one", ratio(*took.values()), "x", 1.5, note)]


def _versions(forge: Forge) -> Iterator[dict[str, bytes]]:
    """Yield adapters of rank 16 that the store does not have yet, with some signs changed."""
    source = forge.work / "adapters" / "lora0"
    config = (source / "adapter_config.json").read_bytes()
    weights = (source / "adapter_model.safetensors").read_bytes()
    values = 8 + int.from_bytes(weights[:8], "little")
    for number in _numbers:
        changed = bytearray(weights)
        for place in range(32):
            if number >> place & 1:
                changed[values + 2 * place + 1] ^= 0x80
        yield {"adapter_config.json": config, "adapter_model.safetensors": bytes(changed)}


async def long_prompts(forge: Forge, _rounds: int, tokens: int) -> list[Figure]:
    """Measure 8 streams beside four long prompts that arrive at once, and short requests one at a time.

    All requests are for the base and without a key, so all share one queue. Long prompts are given up after
    four minutes.
    """
    forge.deploy("long", 1)
    async with replica(forge, "long") as local:

        async def long_s() -> list[float]:
            under_way = [asyncio.ensure_future(local.first_s(local.base, tokens)) for _ in range(4)]
            done, late = await asyncio.wait(under_way, timeout=240)
            for each in late:
                each.cancel()
            await asyncio.gather(*late, return_exceptions=True)
            return [each.result() for each in done]

        async with streams(local.ask, [(local.base, prompt()) for _ in range(8)]):
            with local.steps() as before:
                await asyncio.sleep(5)
            with local.steps() as crowded:
                long, short = asyncio.ensure_future(long_s()), []
                while not long.done():
                    await asyncio.sleep(0.2)
                    short.append(await local.first_s(local.base))
            with local.steps() as after:
                await asyncio.sleep(5)
        alone = await long_s()
    gaps = (crowded.gaps_s, before.gaps_s + after.gaps_s)
    p99, p50 = ([percentile(each, part) for each in gaps] for part in (0.99, 0.5))
    note = f"{formatted(p99, 1e3)} ms; p50 {formatted(p50, 1e3)} ms"
    short_note = f"{len(short)} requests, p50 {percentile(short, 0.5):.2f} s"
    last = max(long.result(), default=math.nan)
    came = f"{len(long.result())} of 4 came; with nothing else {max(alone, default=math.nan):.2f} s"
    return [
        Figure("p99 between tokens, beside / alone", p99[0] / p99[1], "x", 3.0, note),
        Figure("p99 first token of a short request", percentile(short, 0.99), "s", 2.0, short_note),
        Figure("last first token of long prompts", last, "s", None, came),
    ]


Section = Callable[[Forge, int], Awaitable[list[Figure]]]
SECTIONS: Final[Mapping[str, Section]] = {
    **{each.__name__: each for each in (turns, churn, registered, fair, push, add)},
    **{f"long_prompts_{tokens}": partial(long_prompts, tokens=tokens) for tokens in (2000, 8000)},
}


async def measure(names: Sequence[str], forge: Forge, rounds: int) -> bool:
    """Measure sections, print what was found, and return whether every bar is met."""
    met = True
    for name in names:
        began = time.monotonic()
        figures = await SECTIONS[name](forge, rounds)
        met &= all(figure.met for figure in figures)
        load = os.getloadavg()[0]
        print(f"{name}: {rounds} rounds, {time.monotonic() - began:.0f} s, load average {load:.1f}")
        print("\n".join(f"  {figure}" for figure in figures), flush=True)
    return met


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each side of a pair")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="loramux-residency-") as folder:
        names = options.sections or list(SECTIONS)
        return 0 if asyncio.run(measure(names, Forge(Path(folder)), options.rounds)) else 1


if __name__ == "__main__":
    sys.exit(main())
