"""A replica under good, bad, cancelled, slow and broken requests, for a given time.

It is started as a user would, and asked over both APIs. At the end every promise is checked: each request ended
once, nothing is held, memory did not grow, descriptors and processes are those of the start. A table is
printed; the exit status is 1 when a promise is broken.

    python -m benchmarks.soak --minutes 10 --concurrency 16
    python -m benchmarks.soak --minutes 1 --base demo
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import serving
from benchmarks.on_gpu import checkpoint
from loramux import AsyncClient
from loramux.cli.local.tree import free_address
from loramux.records import Finished
from loramux_shared.faults import ClientStalled, Fault

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
ADAPTERS = ("lora0", "lora1", "lora2", "lora3")
STALL_S = 2
"""Seconds that the replica waits for a client that does not read."""
KV_GB = "0.1"
"""Size of the cache, so small that every block is used in the first minute: memory counts when it is first
written to, and a cache of gigabytes would look like a leak for as long as it fills.
"""
GROWTH_MB = 64
"""Bound of the increase of resident memory after the first minute."""
SAMPLE_S = 30


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


@dataclass(frozen=True)
class Held:
    """The resources of the server's process."""

    rss_mb: float
    descriptors: Counter[str]
    """Descriptors by kind: ``socket``, ``pipe``, the path of a file."""
    children: int

    def __str__(self) -> str:
        return f"{self.rss_mb:.0f} MB, {self.descriptors.total()} descriptors, {self.children} children"


class Replica:
    """The inference service as a process."""

    def __init__(self, work: Path, base: str) -> None:
        self.grpc, self.http = (free_address(f"127.0.0.1:{port}") for port in (50062, 8062))
        name, root = _prepare(work, base)
        command = [sys.executable, "-m", "inference_service", "--store", f"file://{work}/store"]
        command += ["--deployment", name, "--local-root", str(root), "--grpc", self.grpc, "--http", self.http]
        environment = os.environ | {"LORAMUX_STALL_TIMEOUT_S": str(STALL_S), "LORAMUX_LOG_FORMAT": "json"}
        environment |= {"LORAMUX_KV_MEMORY_GB": os.environ.get("LORAMUX_KV_MEMORY_GB", KV_GB)}
        self.log = work / "log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, env=environment)  # noqa: S603 - our own command
        self._seen = psutil.Process(self._process.pid)

    async def until_ready(self) -> None:
        """Wait until it serves."""
        async with httpx.AsyncClient() as web, asyncio.timeout(180):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await web.get(f"http://{self.http}/health")).status_code == 200:
                        return
                if self._process.poll() is not None:
                    raise RuntimeError(self.log.read_text())
                await asyncio.sleep(0.2)

    def held(self) -> Held:
        """Return its resources now."""
        descriptors: Counter[str] = Counter()
        for link in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it is closed again
                descriptors[str(link.readlink()).rstrip("0123456789]").removesuffix(":[")] += 1
        children = len(self._seen.children(recursive=True))
        return Held(self._seen.memory_info().rss / 1e6, descriptors, children)

    def stop(self) -> int:
        """End it as an operator does; returns the exit status."""
        self._process.terminate()
        return self._process.wait(60)

    def ended(self) -> Counter[str]:
        """The lines of its log that say that a request ended, by the request's id."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return Counter(line["id"] for line in lines if line["event"] == "request ended")


def _prepare(work: Path, base: str) -> tuple[str, Path]:
    """Build a deployment; returns its name and the folder of its base."""
    if base == "demo":
        prepare = [sys.executable, str(serving.ROOT / "examples/prepare_base.py"), str(serving.BASE)]
        subprocess.run(prepare, check=True, capture_output=True)  # noqa: S603 - our own script
        names = serving.make_adapters(work / "adapters", len(ADAPTERS), rank=8)
        serving.build_deployment(work, names, f"file://{work}/store")
        return "bench", serving.BASE
    device = torch.device("cpu")
    checkpoint.write_base(work / "base", SHAPE, device)
    for name in ADAPTERS:
        checkpoint.write_adapter(work / "adapters" / name, SHAPE, 8, device)
    checkpoint.build_deployment(work, "soak", list(ADAPTERS), 2048)
    return "soak", work


class Clients:
    """Everything that people do to a server."""

    def __init__(self, replica: Replica, web: httpx.AsyncClient, client: AsyncClient, tally: Tally) -> None:
        self._replica, self._web, self._client, self._tally = replica, web, client, tally
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

    def _body(self, most: int = 48) -> dict[str, Any]:
        words = " ".join(f"w{self._draw.randrange(10, 90)}" for _ in range(self._draw.randint(1, 60)))
        model = self._draw.choice(("base", *ADAPTERS))
        return {"model": model, "prompt": words, "max_tokens": self._draw.randint(1, most)}

    async def grpc_good(self) -> None:
        """Read a stream to its end."""
        end = None
        async for event in self._client.generate(**self._body(), temperature=1.0, timeout_s=120):
            end = event
        self._tally.entered += 1
        if isinstance(end, Finished):
            self._tally.ok += 1
        else:
            self._tally.wrong.append(f"a stream ended with {end}")

    async def http_stream(self) -> None:
        """Read events to the last."""
        async with self._web.stream("POST", "/v1/completions", json=self._body() | {"stream": True}) as answer:
            text = (await answer.aread()).decode()
        self._count(answer.status_code, entered=True)
        if not text.endswith("data: [DONE]\n\n"):
            self._tally.wrong.append(f"events ended with {text[-200:]!r}")

    async def http_whole(self) -> None:
        """Wait for a whole answer."""
        answer = await self._web.post("/v1/completions", json=self._body() | {"seed": 3})
        self._count(answer.status_code, entered=True)
        if answer.status_code != 200:
            self._tally.wrong.append(answer.text[:200])

    async def grpc_cancelled(self) -> None:
        """Cancel after a few messages."""
        events = self._client.generate(**self._body(1000), ignore_eos=True)
        for _ in range(self._draw.randint(1, 8)):
            with contextlib.suppress(StopAsyncIteration):
                await anext(events)
        await events.aclose()
        self._tally.entered += 1
        self._tally.broken += 1

    async def http_disconnected(self) -> None:
        """Close the connection in the middle."""
        body = self._body(1000) | {"stream": True, "ignore_eos": True}
        async with self._web.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        self._tally.statuses[answer.status_code] += 1
        self._tally.entered += 1
        self._tally.broken += 1

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
        answer = await self._web.post("/v1/completions", json=self._body() | body)
        self._count(answer.status_code, entered=False)
        if answer.status_code not in (400, 404):
            self._tally.wrong.append(f"{body} was answered {answer.status_code}")

    async def grpc_unread(self) -> None:
        """Stop reading in the middle."""
        events = self._client.generate(**self._body() | {"max_tokens": 1500}, logprobs=20, ignore_eos=True)
        try:
            await anext(events)
            await asyncio.sleep(2 * STALL_S)
            async for _ in events:
                pass
        except ClientStalled:
            self._tally.kinds["of gRPC, not read: told CLIENT_STALLED"] += 1
        self._tally.entered += 1
        self._tally.broken += 1

    async def http_unread(self) -> None:
        """Ask for much and read nothing."""
        body = json.dumps(
            self._body() | {"max_tokens": 1500, "logprobs": 5, "stream": True, "ignore_eos": True}
        )
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with self._connect() as sock:
            sock.send(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            await asyncio.sleep(4 * STALL_S)
        self._tally.statuses[200] += 1
        self._tally.entered += 1
        self._tally.broken += 1

    async def garbage(self) -> None:
        """Send what is no request, or half of one, and go away."""
        with self._connect() as sock:
            sock.send(
                self._draw.choice(
                    (b"\x16\x03\x01", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nhost: x\r\n", b"")
                )
            )
            await asyncio.sleep(self._draw.random() / 10)

    def _connect(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = self._replica.http.split(":")
        sock.connect((host, int(port)))
        return sock

    def _count(self, status: int, *, entered: bool) -> None:
        self._tally.statuses[status] += 1
        self._tally.entered += entered
        self._tally.ok += entered and status == 200


class Scrape:
    """The metrics at one moment."""

    def __init__(self, text: str) -> None:
        self._samples = [each for family in text_string_to_metric_families(text) for each in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Add up the series of a name that have these labels."""
        return sum(
            each.value for each in self._samples if each.name == name and labels.items() <= each.labels.items()
        )


@dataclass(frozen=True)
class Promise:
    """Something that must hold, and what was found."""

    name: str
    expected: str
    found: str
    kept: bool


async def soak(work: Path, minutes: float, concurrency: int, base: str) -> list[Promise]:
    """Run everything, and return what became of the promises."""
    replica, tally = Replica(work, base), Tally()
    try:
        await replica.until_ready()
        limits = httpx.Limits(max_connections=2 * concurrency)
        web = httpx.AsyncClient(base_url=f"http://{replica.http}", timeout=120, limits=limits)
        async with web, AsyncClient(inference=replica.grpc) as client:
            clients = Clients(replica, web, client, tally)
            for _, act in clients.kinds.values():
                await act()  # what is opened once, at the first of a kind, is no leak
        await _until_rest(replica)
        start = replica.held()
        samples = await _drive(replica, tally, minutes, concurrency)
        scrape = await _until_rest(replica)
        end = await _until_closed(replica, start)
    finally:
        status = replica.stop()
    return [*_counts(tally, scrape, replica.ended()), *_holdings(start, samples, end, scrape, status)]


async def _drive(replica: Replica, tally: Tally, minutes: float, concurrency: int) -> list[Held]:
    """Keep so many clients busy; returns what was held every half minute."""
    until = time.monotonic() + 60 * minutes
    limits = httpx.Limits(max_connections=2 * concurrency)
    samples: list[Held] = []
    async with (
        httpx.AsyncClient(base_url=f"http://{replica.http}", timeout=120, limits=limits) as web,
        AsyncClient(inference=replica.grpc) as client,
    ):
        clients = Clients(replica, web, client, tally)

        async def busy() -> None:
            while time.monotonic() < until:
                await clients.one()

        async def watch() -> None:
            while True:
                samples.append(replica.held())
                print(f"{len(samples) * SAMPLE_S - SAMPLE_S:>6} s {samples[-1]}", flush=True)
                await asyncio.sleep(SAMPLE_S)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(busy() for _ in range(concurrency)))
        watching.cancel()
    samples.append(replica.held())
    return samples


async def _until_rest(replica: Replica) -> Scrape:
    """Wait until the server holds nothing, at most as long as its time-outs say; returns the last scrape."""
    async with httpx.AsyncClient(base_url=f"http://{replica.http}") as web:
        for _ in range(100):
            scrape = Scrape((await web.get("/metrics")).text)
            names = ("loramux_sequences_running", "loramux_sequences_waiting", "loramux_kv_cache_blocks_used")
            if not any(scrape.sum(name) for name in names):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(2)  # for connections to close
    return scrape


async def _until_closed(replica: Replica, start: Held) -> Held:
    """Wait until connections are closed: gRPC takes some seconds to see that a client has gone."""
    for _ in range(60):
        held = replica.held()
        if held.descriptors.total() <= start.descriptors.total():
            break
        await asyncio.sleep(0.5)
    return held


def _counts(tally: Tally, scrape: Scrape, ended: Counter[str]) -> Iterator[Promise]:
    yield Promise("answers are as they should be", "0 wrong", str(tally.wrong[:3] or 0), not tally.wrong)
    requests = "loramux_requests_total"
    total, ok = scrape.sum(requests), scrape.sum(requests, outcome="OK")
    yield Promise(
        "every request ended: the metrics", str(tally.entered), f"{total:.0f}", total == tally.entered
    )
    once = len(ended) == tally.entered and set(ended.values()) <= {1}
    found = f"{len(ended)} ids, at most {max(ended.values(), default=0)} lines each"
    yield Promise("every request ended once: the log", f"{tally.entered} ids, 1 line each", found, once)
    most = tally.ok + tally.broken
    yield Promise("those that ended well", f"{tally.ok} to {most}", f"{ok:.0f}", tally.ok <= ok <= most)
    internal = scrape.sum(requests, outcome="INTERNAL") + scrape.sum(
        "loramux_http_responses_total", status="500"
    )
    yield Promise("nothing failed inside", "0", f"{internal:.0f}", not internal)
    for status in sorted(tally.statuses - Counter({200: tally.statuses[200]})):
        found_n = scrape.sum("loramux_http_responses_total", status=str(status))
        known = tally.statuses[status]
        # Garbage is refused with 400 too, and its senders do not stay to hear it.
        most = known + (tally.kinds["HTTP, garbage"] + 1 if status == 400 else 0)
        yield Promise(f"HTTP {status}", f"{known} to {most}", f"{found_n:.0f}", known <= found_n <= most)


def _holdings(start: Held, samples: list[Held], end: Held, scrape: Scrape, status: int) -> Iterator[Promise]:
    for name in ("loramux_sequences_running", "loramux_sequences_waiting", "loramux_kv_cache_blocks_used"):
        yield Promise(name, "0", f"{scrape.sum(name):.0f}", not scrape.sum(name))
    settled = samples[min(60 // SAMPLE_S, len(samples) - 1) :]
    growth = max(each.rss_mb for each in settled) - settled[0].rss_mb
    yield Promise(
        "increase of memory after a minute", f"<= {GROWTH_MB} MB", f"{growth:.0f} MB", growth <= GROWTH_MB
    )
    before, more = start.descriptors.total(), end.descriptors - start.descriptors
    found = f"{end.descriptors.total()}; new: {dict(more) or 'none'}"
    yield Promise("open descriptors", f"<= {before}", found, end.descriptors.total() <= before)
    yield Promise("child processes", f"<= {start.children}", str(end.children), end.children <= start.children)
    yield Promise("exit status", "0", str(status), status == 0)


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument(
        "--base", choices=("tiny", "demo"), default="tiny", help="random weights, or the demo's base"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-soak-") as folder:
        promises = asyncio.run(soak(Path(folder), options.minutes, options.concurrency, options.base))
    for each in promises:
        print(f"{'kept' if each.kept else 'BROKEN':<7} {each.name:<42} {each.expected:>24}  {each.found}")
    return 0 if all(each.kept for each in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
