"""Many streams over both APIs, in the engine's process and in API processes of their own.

The engine's steps take a time and no processor. For each API, number of API processes N and number of streams:
tokens a second, the 99th percentiles of first tokens of streams that begin at once and of steps, and
microseconds of CPU a token of the engine's process, of API processes and of the clients, which are one process.
Then one request at a time. The exit status is 1 when a bar is missed.

    python -m benchmarks.streams
    python -m benchmarks.streams --apis grpc --processes 0 1 --streams 8 256
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Final

import psutil

from benchmarks.figures import Figure, machine, percentile

FEW, MANY = 8, 256
"""Streams whose steps are compared."""
LONG, SHORT = 8000, 64
"""Tokens of streams that outlast their measurement, and of one request at a time."""
TURNS, ALONE = 3, 10
"""Turns of a server of each kind, and requests one at a time in each."""
BAR_S, BAR_STREAMS = 1.0, 1000


class Server:
    """The server's process, and those that it started."""

    def __init__(self, step_ms: float, processes: int) -> None:
        command = [sys.executable, "-m", "benchmarks.streams_server", str(step_ms), str(processes)]
        pipe = subprocess.PIPE
        self.process = psutil.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self.addresses: dict[str, str] = json.loads(self.process.stdout.readline())
        self.children = self.process.children(recursive=True)

    def report(self) -> tuple[list[float], int]:
        """Return the seconds of steps and the number of tokens since the last call."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        steps, tokens = json.loads(self.process.stdout.readline())
        return steps, tokens

    @contextmanager
    def clients(self, api: str, streams: int, tokens: int) -> Iterator[psutil.Popen]:
        """Have so many streams run for as long as the block takes."""
        command = [sys.executable, "-m", "benchmarks.streams_clients", api, self.addresses[api]]
        process = psutil.Popen([*command, str(streams), str(tokens)], stdout=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def end(self) -> None:
        """End all processes."""
        for each in (*self.children, self.process):
            each.kill()
        self.process.wait()


@dataclass(frozen=True)
class Point:
    """The results with so many streams over one API and so many API processes."""

    api: str
    processes: int
    streams: int
    tokens_per_s: float
    first_s: float
    step_s: float
    token_us: Sequence[float]

    def __str__(self) -> str:
        head = f"{self.api:<6}{self.processes:>3}{self.streams:>8}{self.tokens_per_s:>11.0f}"
        cells = "".join(f"{each:>9.1f}" for each in (self.step_s * 1e3, *self.token_us))
        return f"{head}{self.first_s * 1e3:>9.0f}{cells}"


HEADING: Final = (
    f"{'p99, ms':>44}{'CPU, us a token':>29}\n"
    f"{'API':<6}{'N':>3}{'streams':>8}{'tokens/s':>11}{'first':>9}{'step':>9}"
    f"{'engine':>9}{'APIs':>9}{'clients':>9}"
)


def measure(api: str, processes: int, streams: int, step_ms: float, seconds: float) -> Point:
    """Measure streams on a server of their own."""
    server = Server(step_ms, processes)
    try:
        with server.clients(api, FEW, SHORT) as warm:
            warm.stdout.readline()
        with server.clients(api, streams, LONG) as clients:
            firsts = json.loads(clients.stdout.readline())
            groups: list[list[psutil.Process]] = [[server.process], server.children, [clients]]
            before, began_s = [_cpu_s(group) for group in groups], time.monotonic()
            server.report()
            time.sleep(seconds)
            (steps, tokens), after = server.report(), [_cpu_s(group) for group in groups]
            took_s = time.monotonic() - began_s
    finally:
        server.end()
    us = [1e6 * (end - start) / tokens for start, end in zip(before, after, strict=True)]
    first_s, step_s = percentile(firsts, 0.99), percentile(steps, 0.99)
    return Point(api, processes, streams, tokens / took_s, first_s, step_s, us)


def _cpu_s(group: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (each.cpu_times() for each in group))


Alone = Mapping[int, tuple[float, float]]
"""Seconds to a first token, and of each token behind it, by N."""


def alone(api: str, step_ms: float) -> Alone:
    """Measure one request at a time without and with an API process, in turns."""
    servers = {number: Server(step_ms, number) for number in (0, 1)}
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in servers}
    try:
        for _ in range(TURNS):
            for number, server in servers.items():
                with server.clients(api, 1, SHORT) as clients:
                    for _ in range(ALONE):
                        [first_s], [end_s] = (json.loads(clients.stdout.readline()) for _ in range(2))
                        found[number].append((first_s, (end_s - first_s) / (SHORT - 1)))
    finally:
        for server in servers.values():
            server.end()
    halves = {number: list(zip(*each, strict=True)) for number, each in found.items()}
    return {number: (median(firsts), median(later)) for number, (firsts, later) in halves.items()}


def figures(points: Sequence[Point], one: Mapping[str, Alone]) -> list[Figure]:
    """Return what has bars; that on tokens a second is one on the seconds of a token."""
    by_key = {(point.api, point.processes, point.streams): point for point in points}
    found = []
    for (api, number, streams), point in by_key.items():
        name = f"{api}, N = {number}, {streams}"
        if number == 1 and (inside := by_key.get((api, 0, streams))):
            slower = inside.tokens_per_s / point.tokens_per_s
            found.append(Figure(f"{name}: seconds a token against N = 0", slower, "x", 1 / 1.6))
        if streams == MANY and number == 1 and (few := by_key.get((api, number, FEW))):
            found.append(Figure(f"{name}: p99 step against {FEW}", point.step_s / few.step_s, "x", 1.2))
        if streams == BAR_STREAMS:
            found.append(Figure(f"{name}: p99 first token", point.first_s, "s", BAR_S))
    for api, times in one.items():
        for what, inside_s, beside_s in zip(("first token", "token"), times[0], times[1], strict=True):
            note = f"{inside_s * 1e3:.2f} to {beside_s * 1e3:.2f} ms"
            found.append(Figure(f"{api}, N = 1, 1: {what} against N = 0", beside_s / inside_s, "x", 1.03, note))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apis", nargs="+", choices=("http", "grpc"), default=("http", "grpc"))
    parser.add_argument("--processes", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--streams", type=int, nargs="*", default=(FEW, 64, MANY, BAR_STREAMS))
    parser.add_argument("--step-ms", type=float, default=2)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--alone-step-ms", type=float, default=10, help="steps of one request at a time")
    options = parser.parse_args(arguments)
    print(HEADING)
    points: list[Point] = []
    for api in options.apis:
        for streams in options.streams:
            for number in options.processes:
                points.append(measure(api, number, streams, options.step_ms, options.seconds))
                print(points[-1], flush=True)
    both = {0, 1} <= set(options.processes)
    one = {api: alone(api, options.alone_step_ms) for api in options.apis if both}
    found = figures(points, one)
    print(machine(), *found, sep="\n")
    return 0 if all(figure.met for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main())
