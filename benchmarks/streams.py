"""Many streams: the time of a first token over both APIs while hundreds of answers are under way.

An engine whose steps take a time and no processor stands behind the real APIs, in a process of its own; the
clients of the streams are another process, and the calls that are timed come from this one. `begin` is the time
to the first token where all streams begin at once, `beside` that of 40 calls at once beside streams that run,
each of which has a token in every step. The exit status is 1 when a bar is missed.

    python -m benchmarks.streams
    python -m benchmarks.streams --streams 64 256 --step-ms 10 --interval-ms 0
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import httpx
import psutil

from benchmarks.figures import Figure, percentile
from benchmarks.streams_clients import first_tokens_s, opened

CLIENTS: Final = ("grpc/1", "grpc/16", "http")
"""APIs, and their numbers of channels."""
NEW: Final = 40
"""Calls that come beside the streams ..."""
NEW_TOKENS: Final = 4
"""... and their tokens."""
BAR_S: Final = 1.0
BAR_STREAMS: Final = 1000
GROWTH_BAR: Final = 2.5
"""Times as long may half of the first tokens take where twice as many begin."""


class Server:
    """The server's process, and what it says of itself."""

    def __init__(self, step_ms: float, interval_ms: float) -> None:
        command = [sys.executable, "-m", "benchmarks.streams_server", str(step_ms), str(interval_ms)]
        self.process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.addresses: dict[str, str] = json.loads(self.process.stdout.readline())

    def used(self) -> tuple[float, float]:
        """Return the seconds of processors that it has had, and the tokens of all answers so far."""
        times = self.process.cpu_times()
        text = httpx.get(f"http://{self.addresses['http']}/metrics", timeout=60).text
        tokens = (line for line in text.splitlines() if line.startswith("loramux_generated_tokens_total{"))
        return times.user + times.system, sum(float(line.rpartition(" ")[2]) for line in tokens)


@dataclass(frozen=True)
class Point:
    """The results with so many streams of one kind of clients: seconds to first tokens."""

    clients: str
    streams: int
    begin_s: Sequence[float]
    beside_s: Sequence[float]
    token_us: float
    """Microseconds of the server's CPU per token, its engine's thread included."""

    def __str__(self) -> str:
        firsts = (percentile(found, part) for found in (self.begin_s, self.beside_s) for part in (0.5, 0.99))
        cells = "".join(f"{seconds * 1e3:>8.0f}" for seconds in firsts)
        return f"{self.clients:<8}{self.streams:>6}{cells}{self.token_us:>10.1f}"


HEADING: Final = (
    f"{'':14}{'all begin, ms':>16}{f'{NEW} beside them':>16}\n"
    f"{'clients':<8}{'N':>6}{'p50':>8}{'p99':>8}{'p50':>8}{'p99':>8}{'us/token':>10}"
)


@contextmanager
def _ended(process: psutil.Popen) -> Iterator[psutil.Popen]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def measure(clients: str, streams: int, step_ms: float, interval_ms: float) -> Point:
    """Measure both situations on a server of their own."""
    kind, _, channels = clients.partition("/")
    server = Server(step_ms, interval_ms)
    with _ended(server.process):
        address = server.addresses[kind]
        async with opened(kind, address, 1) as warm:
            await first_tokens_s(warm, 8, NEW_TOKENS)
        command = [
            sys.executable,
            "-m",
            "benchmarks.streams_clients",
            kind,
            address,
            channels or "1",
            str(streams),
        ]
        with _ended(psutil.Popen(command, stdout=subprocess.PIPE)) as process:
            begin = json.loads(process.stdout.readline())
            before = server.used()
            await asyncio.sleep(2)
            cpu_s, tokens = (after - first for after, first in zip(server.used(), before, strict=True))
            beside: list[float] = []
            for _ in range(3):
                async with opened(kind, address, 1) as calls:
                    await first_tokens_s(calls, 1, NEW_TOKENS)  # the connection is there
                    beside += await first_tokens_s(calls, NEW, NEW_TOKENS)
    return Point(clients, streams, begin, beside, 1e6 * cpu_s / tokens)


def figures(points: Sequence[Point]) -> list[Figure]:
    """Return what has bars."""
    found = []
    by_key = {(point.clients, point.streams): point for point in points}
    for point in points:
        name = f"{point.clients}, {point.streams}"
        if point.streams == BAR_STREAMS:
            for what, seconds in (("all begin", point.begin_s), (f"{NEW} beside them", point.beside_s)):
                found.append(Figure(f"{name}: p99, {what}", percentile(seconds, 0.99), "s", BAR_S))
        if half := by_key.get((point.clients, point.streams // 2)):
            growth = percentile(point.begin_s, 0.5) / percentile(half.begin_s, 0.5)
            found.append(Figure(f"{name}: p50, all begin, against {half.streams}", growth, "x", GROWTH_BAR))
    return found


async def _measure(options: argparse.Namespace) -> bool:
    print(HEADING)
    points = []
    for streams in options.streams:
        for clients in CLIENTS:
            points.append(await measure(clients, streams, options.step_ms, options.interval_ms))
            print(points[-1], flush=True)
    found = figures(points)
    print(f"load average {os.getloadavg()[0]:.1f}", *found, sep="\n")
    return all(figure.met for figure in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=(100, 500, 1000))
    parser.add_argument("--step-ms", type=float, default=40)
    parser.add_argument("--interval-ms", type=float, default=40, help="LORAMUX_STREAM_INTERVAL_MS")
    return 0 if asyncio.run(_measure(parser.parse_args(arguments))) else 1


if __name__ == "__main__":
    sys.exit(main())
