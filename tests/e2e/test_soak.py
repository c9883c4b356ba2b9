"""A replica under good, bad, cancelled, slow and broken requests, for a given time.

It is started as a user would, and asked over both APIs. At the end every promise is checked: each request ended
once, nothing is held, memory did not grow, descriptors and processes are those of the start. A table is
printed; the exit status is 1 when a promise is broken.

    python -m tests.e2e.test_soak --minutes 10 --concurrency 16
"""

import argparse
import asyncio
import contextlib
import gc
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import torch

from benchmarks.on_gpu import checkpoint
from benchmarks.on_gpu.model import TINY
from benchmarks.service import Service, replica_process
from loramux import AsyncClient
from loramux.records import Finished
from loramux_shared.faults import ClientStalled, Fault
from tests.support.metrics import Scrape

SHAPE = TINY | {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
ADAPTERS = ("lora0", "lora1", "lora2", "lora3")
STALL_S = 2
"""Seconds that the replica waits for a client that does not read."""
KV_GB = 0.1
"""Size of the cache, so small that every block is used in the first minute: memory counts when it is first
written to, and a cache of gigabytes would look like a leak for as long as it fills.
"""
GROWTH_MB = 64
"""Bound of the increase of resident memory after the first minute."""
SAMPLE_S = 30
PATH = "/v1/completions"
HOLDINGS = ("loramux_sequences_running", "loramux_sequences_waiting", "loramux_kv_cache_blocks_used")


@dataclass
class Tally:
    """The clients' counts."""

    kinds: Counter[str] = field(default_factory=Counter)
    entered: int = 0
    """Requests that reached the engine's API, as the metrics count them."""
    ok: int = 0
    """Those that the client saw end well."""
    broken: int = 0
    """Those that the client left or did not read: the server may have been faster."""
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def answered(self, status: int, text: str, *, right: bool) -> None:
        """Count an answer over HTTP; those that are refused with 400 never enter."""
        self.statuses[status] += 1
        self.entered += status != 400
        self.ok += status == 200
        if not right:
            self.wrong.append(f"{status}: {text[-200:]}")

    def left(self) -> None:
        """Count a request whose client left."""
        self.entered += 1
        self.broken += 1


@dataclass(frozen=True)
class Held:
    """The resources of the server's process."""

    rss_mb: float
    descriptors: Counter[str]
    """Descriptors by kind: ``socket``, ``pipe``, the path of a file."""
    children: int

    @classmethod
    def of(cls, replica: Service) -> Self:
        """Return the resources that a replica has now."""
        descriptors: Counter[str] = Counter()
        for link in Path(f"/proc/{replica.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is closed again
                descriptors[str(link.readlink()).rstrip("0123456789]").removesuffix(":[")] += 1
        children = len(replica.process.children(recursive=True))
        return cls(replica.process.memory_info().rss / 1e6, descriptors, children)

    def __str__(self) -> str:
        return f"{self.rss_mb:.0f} MB, {self.descriptors.total()} descriptors, {self.children} children"


def started(work: Path) -> Service:
    """Build a deployment of random weights, and serve it."""
    device = torch.device("cpu")
    checkpoint.write_base(work / "base", SHAPE, device)
    for name in ADAPTERS:
        checkpoint.write_adapter(work / "adapters" / name, SHAPE, 8, device)
    checkpoint.build_deployment(work, "soak", list(ADAPTERS), 2048)
    return replica_process(work, "soak", stall_timeout_s=STALL_S, kv_memory_gb=KV_GB)


class Clients:
    """Everything that people do to a server."""

    def __init__(self, address: str, web: httpx.AsyncClient, client: AsyncClient, tally: Tally) -> None:
        self._address, self._web, self._client, self._tally = address, web, client, tally
        self._draw = random.Random(0)
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "gRPC, read to the end": (30, self.grpc_good),
            "HTTP, streamed": (20, self.http_stream),
            "HTTP, whole": (20, self.http_whole),
            "gRPC, cancelled": (8, self.grpc_cancelled),
            "HTTP, disconnected": (8, self.http_disconnected),
            "gRPC, refused": (5, self.grpc_refused),
            "HTTP, refused": (5, self.http_refused),
            "gRPC, not read": (1, self.grpc_unread),
            "HTTP, not read": (1, self.http_unread),
            "HTTP, garbage": (3, self.garbage),
        }
        """Requests by kind, with the weight with which each is drawn."""

    async def one(self) -> None:
        """Do one of them."""
        weights = [weight for weight, _ in self.kinds.values()]
        [name] = self._draw.choices(list(self.kinds), weights)
        await self.kinds[name][1]()
        self._tally.kinds[name] += 1

    def _body(self, most: int = 48, **more: Any) -> dict[str, Any]:
        words = " ".join(f"w{self._draw.randrange(10, 90)}" for _ in range(self._draw.randint(1, 60)))
        model = self._draw.choice(("base", *ADAPTERS))
        return {"model": model, "prompt": words, "max_tokens": self._draw.randint(1, most), **more}

    async def grpc_good(self) -> None:
        """Read a stream to its end."""
        end = None
        async for event in self._client.generate(**self._body(), temperature=1.0, timeout_s=120):
            end = event
        good = isinstance(end, Finished)
        self._tally.entered += 1
        self._tally.ok += good
        self._tally.wrong += [] if good else [f"a stream ended with {end}"]

    async def http_stream(self) -> None:
        """Read events to the last."""
        answer = await self._web.post(PATH, json=self._body(stream=True))
        self._tally.answered(answer.status_code, answer.text, right=answer.text.endswith("data: [DONE]\n\n"))

    async def http_whole(self) -> None:
        """Wait for a whole answer."""
        answer = await self._web.post(PATH, json=self._body(seed=3))
        self._tally.answered(answer.status_code, answer.text, right=answer.status_code == 200)

    async def grpc_cancelled(self) -> None:
        """Cancel after a few messages."""
        events = self._client.generate(**self._body(1000), ignore_eos=True)
        for _ in range(self._draw.randint(1, 8)):
            with contextlib.suppress(StopAsyncIteration):
                await anext(events)
        await events.aclose()
        self._tally.left()

    async def http_disconnected(self) -> None:
        """Close the connection in the middle."""
        async with self._web.stream(
            "POST", PATH, json=self._body(1000, stream=True, ignore_eos=True)
        ) as answer:
            async for _ in answer.aiter_lines():
                break
        self._tally.statuses[answer.status_code] += 1
        self._tally.left()

    async def grpc_refused(self) -> None:
        """Ask for what is out of bounds."""
        try:
            await self._client.complete("base", "the river", temperature=-1.0)
        except Fault:
            self._tally.entered += 1
        else:
            self._tally.wrong.append("a temperature of -1 was taken")

    async def http_refused(self) -> None:
        """Ask for what does not exist."""
        body = self._draw.choice(({"temprature": 1}, {"model": "nope"}, {"max_tokens": "many"}))
        answer = await self._web.post(PATH, json=self._body() | body)
        self._tally.answered(answer.status_code, answer.text, right=answer.status_code in (400, 404))

    async def grpc_unread(self) -> None:
        """Stop reading in the middle."""
        body = self._body() | {"max_tokens": 1500}
        events = self._client.generate(**body, logprobs=20, ignore_eos=True)
        try:
            await anext(events)
            await asyncio.sleep(2 * STALL_S)
            async for _ in events:
                pass
        except ClientStalled:
            self._tally.kinds["of gRPC, not read: CLIENT_STALLED"] += 1
        self._tally.left()

    async def http_unread(self) -> None:
        """Ask for much and read nothing."""
        body = json.dumps(self._body(logprobs=5, stream=True, ignore_eos=True) | {"max_tokens": 1500})
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        await self._send(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode(), 4 * STALL_S)
        self._tally.statuses[200] += 1
        self._tally.left()

    async def garbage(self) -> None:
        """Send what is no request, or half of one, and go away."""
        halves = (b"\x16\x03\x01", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nhost: x\r\n", b"")
        await self._send(self._draw.choice(halves), self._draw.random() / 10)

    async def _send(self, data: bytes, stays_s: float) -> None:
        """Send, read nothing, and go away after a time."""
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = self._address.split(":")
            sock.connect((host, int(port)))
            sock.send(data)
            await asyncio.sleep(stays_s)


@dataclass(frozen=True)
class Promise:
    """A number that must lie within bounds."""

    name: str
    found: float
    most: float = 0
    least: float = 0
    note: str = ""

    @property
    def kept(self) -> bool:
        """Return True if it does."""
        return self.least <= self.found <= self.most

    def __str__(self) -> str:
        bounds = f"{self.least:g} to {self.most:g}"
        return f"{'kept' if self.kept else 'BROKEN':<7} {self.name:<42}{bounds:>16}{self.found:>8g} {self.note}"


@asynccontextmanager
async def clients_of(replica: Service, tally: Tally, concurrency: int) -> AsyncIterator[Clients]:
    """Open both kinds of clients."""
    limits = httpx.Limits(max_connections=2 * concurrency)
    async with (
        httpx.AsyncClient(base_url=f"http://{replica.http}", timeout=120, limits=limits) as web,
        AsyncClient(inference=replica.grpc) as client,
    ):
        yield Clients(replica.http, web, client, tally)


async def soak(work: Path, minutes: float, concurrency: int) -> list[Promise]:
    """Run everything, and return what became of the promises."""
    replica, tally = started(work), Tally()
    try:
        async with clients_of(replica, tally, concurrency) as clients:
            for _, act in clients.kinds.values():
                await act()  # what is opened once, at the first of a kind, is no leak
        await _until_rest(replica)
        start = Held.of(replica)
        samples = await _drive(replica, tally, minutes, concurrency)
        scrape = await _until_rest(replica)
        gc.collect()  # a cancelled call of grpc.aio is part of a cycle, and keeps its client's connection open
        for _ in range(60):  # gRPC takes some seconds to see that a client has gone
            end = Held.of(replica)
            if end.descriptors.total() <= start.descriptors.total():
                break
            await asyncio.sleep(0.5)
    finally:
        status = replica.stop()
    ended = Counter(line["id"] for line in replica.logged("request ended"))
    return [
        *_counts(tally, scrape, ended),
        *_holdings(start, samples, end, scrape),
        Promise("exit status", status),
    ]


async def _drive(replica: Service, tally: Tally, minutes: float, concurrency: int) -> list[Held]:
    """Keep so many clients busy; returns what was held every half minute."""
    until = time.monotonic() + 60 * minutes
    samples: list[Held] = []
    async with clients_of(replica, tally, concurrency) as clients:

        async def busy() -> None:
            while time.monotonic() < until:
                await clients.one()

        async def watch() -> None:
            while True:
                samples.append(Held.of(replica))
                print(f"{len(samples) * SAMPLE_S - SAMPLE_S:>6} s {samples[-1]}", flush=True)  # noqa: T201 - a script too
                await asyncio.sleep(SAMPLE_S)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(busy() for _ in range(concurrency)))
        watching.cancel()
    samples.append(Held.of(replica))
    return samples


async def _until_rest(replica: Service) -> Scrape:
    """Wait until the server holds nothing, at most as long as its time-outs say; returns the last scrape."""
    async with httpx.AsyncClient(base_url=f"http://{replica.http}") as web:
        for _ in range(100):
            scrape = Scrape((await web.get("/metrics")).text)
            if not any(_sum(scrape, name) for name in HOLDINGS):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(2)  # for connections to close
    return scrape


def _sum(scrape: Scrape, name: str, **labels: str) -> float:
    return sum(value for own, value in scrape.series(name) if labels.items() <= own.items())


def _counts(tally: Tally, scrape: Scrape, ended: Counter[str]) -> Iterator[Promise]:
    requests, responses, entered = "loramux_requests_total", "loramux_http_responses_total", tally.entered
    yield Promise("wrong answers", len(tally.wrong), note=str(tally.wrong[:3] or ""))
    yield Promise("requests that ended: the metrics", _sum(scrape, requests), entered, entered)
    yield Promise("requests that ended: the log", len(ended), entered, entered)
    yield Promise("lines of the log for a request", max(ended.values(), default=0), 1)
    yield Promise("that ended well", _sum(scrape, requests, outcome="OK"), tally.ok + tally.broken, tally.ok)
    yield Promise("internal failures", _sum(scrape, requests, outcome="INTERNAL"))
    yield Promise("HTTP 500", _sum(scrape, responses, status="500"))
    for status in sorted(tally.statuses.keys() - {200}):
        known = tally.statuses[status]
        # Garbage is refused with 400 too, and its senders do not stay to hear it.
        most = known + (tally.kinds["HTTP, garbage"] + 1 if status == 400 else 0)
        yield Promise(f"HTTP {status}", _sum(scrape, responses, status=str(status)), most, known)


def _holdings(start: Held, samples: list[Held], end: Held, scrape: Scrape) -> Iterator[Promise]:
    for name in HOLDINGS:
        yield Promise(name, _sum(scrape, name))
    settled = samples[min(60 // SAMPLE_S, len(samples) - 1) :]
    growth = max(each.rss_mb for each in settled) - settled[0].rss_mb
    yield Promise("increase of memory after a minute, MB", growth, GROWTH_MB)
    new = dict(end.descriptors - start.descriptors)
    yield Promise("open descriptors", end.descriptors.total(), start.descriptors.total(), note=f"new: {new}")
    yield Promise("child processes", end.children, start.children)


@pytest.mark.sweep
async def test_a_replica_keeps_its_promises_under_everything(tmp_path: Path) -> None:
    """Twenty seconds of good, bad, cancelled, slow and broken requests: each ends once, and nothing is held."""
    promises = await soak(tmp_path, minutes=1 / 3, concurrency=8)
    assert not [each for each in promises if not each.kept]


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--concurrency", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-soak-") as folder:
        promises = asyncio.run(soak(Path(folder), options.minutes, options.concurrency))
    print(*promises, sep="\n")  # noqa: T201 - a script too
    return 0 if all(each.kept for each in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
