"""Many streams: the time of a first token over both APIs while hundreds of answers are under way.

An engine whose steps take a time and no processor stands behind the real APIs, in a process of its own; the
clients of the streams are another process, and the calls that are timed come from this one. `begin` is the time
to the first token where all streams begin at once, `beside` that of 40 calls at once beside streams that run,
each of which has a token in every step. The exit status is 1 when a bar is missed.

    python -m benchmarks.streams
    python -m benchmarks.streams --streams 500 1000 --clients grpc/16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import httpx
import psutil

from benchmarks.moving.figures import Figure, percentile
from benchmarks.servers.clients import Steady, clients_of, first_tokens_s

STREAMS: Final = (100, 400, 500, 1000, 2000)
CLIENTS: Final = ("grpc/1", "grpc/16", "http")
"""APIs, and their numbers of channels."""
STEP_MS: Final = 40
INTERVAL_MS: Final = 40
LONG: Final = 6000
"""Tokens of the streams that run on."""
NEW: Final = 40
"""Calls that come beside them ..."""
NEW_TOKENS: Final = 4
"""... and their tokens."""
BAR_S: Final = 1.0
BAR_STREAMS: Final = 1000
GROWTH_BAR: Final = 2.5
"""Times as long may half of the first tokens take where twice as many begin."""
TTFT: Final = "loramux_time_to_first_token_seconds"


class Server:
    """The server's process, and what it says of itself."""

    def __init__(self, step_ms: float, interval_ms: float) -> None:
        command = [sys.executable, "-m", "benchmarks.servers.server", "--step-ms", str(step_ms)]
        command += ["--interval-ms", str(interval_ms)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # noqa: S603 - ours
        assert self.process.stdout is not None  # noqa: S101 - a pipe
        self.addresses: dict[str, str] = json.loads(self.process.stdout.readline())
        self._seen = psutil.Process(self.process.pid)

    @property
    def cpu_s(self) -> float:
        """Seconds of processors that it has had."""
        times = self._seen.cpu_times()
        return times.user + times.system

    def first_tokens(self) -> tuple[float, float]:
        """Sum and number of its own times to first tokens."""
        return self._sum(f"{TTFT}_sum"), self._sum(f"{TTFT}_count")

    def generated(self) -> float:
        """Tokens of all answers so far."""
        return self._sum("loramux_generated_tokens_total")

    def _sum(self, name: str) -> float:
        text = httpx.get(f"http://{self.addresses['http']}/metrics", timeout=60).text
        return sum(_values(text, name))


def _values(text: str, name: str) -> Iterator[float]:
    return (float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


@dataclass(frozen=True)
class Firsts:
    """Seconds to first tokens."""

    p50_s: float
    p99_s: float
    mean_s: float
    said_s: float
    """Their mean as the server says it."""

    def __str__(self) -> str:
        return "".join(f"{each * 1e3:>8.0f}" for each in (self.p50_s, self.p99_s, self.mean_s, self.said_s))


@dataclass(frozen=True)
class Point:
    """The results with so many streams of one kind of clients."""

    clients: str
    streams: int
    begin: Firsts
    beside: Firsts
    steady: Steady
    cpu: float
    """Seconds of a core per second, of the server with its streams."""
    token_us: float
    """Microseconds of the server's CPU per token, its engine's thread included."""

    def __str__(self) -> str:
        steady = self.steady
        rest = f"{steady.gap_p50_s * 1e3:>8.0f}{steady.gap_p99_s * 1e3:>8.0f}{steady.messages_per_s:>9.0f}"
        cores = f"{self.cpu:>7.2f}{steady.cpu:>7.2f}{self.token_us:>10.1f}"
        return f"{self.clients:<8}{self.streams:>6}{self.begin}  {self.beside}  {rest}{cores}"


_FIRSTS: Final = "     p50     p99    mean  server"
HEADING: Final = (
    f"{'':14}{'all begin, ms':^32}  {f'{NEW} beside them, ms':^32}  {'a stream, ms':^16}{'':9}{'cores':^14}\n"
    f"{'clients':<8}{'N':>6}{_FIRSTS:>32}  {_FIRSTS:>32}  {'p50':>8}{'p99':>8}"
    f"{'msg/s':>9}{'server':>7}{'client':>7}{'us/token':>10}"
)


@contextmanager
def _server(step_ms: float, interval_ms: float) -> Iterator[Server]:
    server = Server(step_ms, interval_ms)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@contextmanager
def _streams(kind: str, address: str, channels: int, count: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "benchmarks.servers.clients", "--api", kind, "--address", address]
    command += ["--channels", str(channels), "--streams", str(count), "--tokens", str(LONG)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - ours
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def measure(clients: str, streams: int, rounds: int, step_ms: float, interval_ms: float) -> Point:
    """Measure both situations on a server of their own."""
    kind, _, channels = clients.partition("/")
    with _server(step_ms, interval_ms) as server:
        address = server.addresses[kind]
        async with clients_of(kind, address, 1) as warm:
            await first_tokens_s(warm, 8, NEW_TOKENS)
        before = server.first_tokens()
        with _streams(kind, address, int(channels or 1), streams) as process:
            assert process.stdin and process.stdout  # noqa: S101, PT018 - pipes
            begin = _firsts(json.loads(process.stdout.readline()), before, server.first_tokens())
            cpu_s, generated, since = server.cpu_s, server.generated(), time.monotonic()
            await asyncio.sleep(2)
            used_s = server.cpu_s - cpu_s
            cpu = used_s / (time.monotonic() - since)
            token_us = used_s * 1e6 / (server.generated() - generated)
            before, found = server.first_tokens(), []
            for _ in range(rounds):
                async with clients_of(kind, address, 1) as opened:
                    await first_tokens_s(opened, 1, NEW_TOKENS)  # the connection is there
                    found += await first_tokens_s(opened, NEW, NEW_TOKENS)
            beside = _firsts(found, before, server.first_tokens())
            process.stdin.close()
            steady = Steady(**json.loads(process.stdout.readline()))
    return Point(clients, streams, begin, beside, steady, cpu, token_us)


def _firsts(found: Sequence[float], before: tuple[float, float], after: tuple[float, float]) -> Firsts:
    count = after[1] - before[1]
    mean = (after[0] - before[0]) / count if count else math.nan
    return Firsts(percentile(found, 0.5), percentile(found, 0.99), statistics.fmean(found), mean)


def figures(points: Sequence[Point]) -> list[Figure]:
    """Return what has bars."""
    found = []
    by_key = {(point.clients, point.streams): point for point in points}
    for point in points:
        name = f"{point.clients}, {point.streams}"
        if point.streams == BAR_STREAMS:
            found.append(Figure(f"{name}: p99, all begin", point.begin.p99_s, "s", BAR_S))
            found.append(Figure(f"{name}: p99, {NEW} beside them", point.beside.p99_s, "s", BAR_S))
        if half := by_key.get((point.clients, point.streams // 2)):
            growth = point.begin.p50_s / half.begin.p50_s
            found.append(Figure(f"{name}: p50, all begin, against {half.streams}", growth, "x", GROWTH_BAR))
    return found


async def _measure(options: argparse.Namespace) -> bool:
    print(HEADING)
    points = []
    for streams in options.streams:
        for clients in options.clients:
            points.append(await measure(clients, streams, options.rounds, options.step_ms, options.interval_ms))
            print(points[-1], flush=True)
    found = figures(points)
    print(f"load average {os.getloadavg()[0]:.1f}", *found, sep="\n")
    return all(figure.met for figure in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=3, help=f"of {NEW} calls beside the streams")
    parser.add_argument("--step-ms", type=float, default=STEP_MS)
    parser.add_argument("--interval-ms", type=float, default=INTERVAL_MS, help="LORAMUX_STREAM_INTERVAL_MS")
    return 0 if asyncio.run(_measure(parser.parse_args(arguments))) else 1


if __name__ == "__main__":
    sys.exit(main())
