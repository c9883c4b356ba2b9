"""A replica under good, bad, cancelled, slow and broken requests, over both APIs.

SOAK_MINUTES says for how long; without it, it is a third of a minute, which is too short for memory to count.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
from loramux_shared.faults import ClientStalled, RequestInvalid
from tests.support.metrics import Scrape

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.33"))
CONCURRENCY = 8
SHAPE = TINY | {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
ADAPTERS = ("lora0", "lora1", "lora2", "lora3")
STALL_S = 2
"""Seconds that the replica waits for a client that does not read."""
KV_GB = 0.1
"""Size of the cache: every block is used in the first minute, so that a cache that fills is no leak."""
GROWTH_MB = 64
"""Bound of the increase of resident memory after the first minute."""
PATH = "/v1/completions"
HOLDINGS = ("loramux_sequences_running", "loramux_sequences_waiting", "loramux_kv_cache_blocks_used")


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


@dataclass
class Tally:
    """Requests, as the clients count them."""

    entered: int = 0
    """Requests that reached the engine's API, as the metrics count them."""
    ok: int = 0
    """Those that the client saw end well."""
    broken: int = 0
    """Those that the client left or did not read: the server may have been faster."""

    def left(self) -> None:
        """Count a request whose client left."""
        self.entered += 1
        self.broken += 1


class Clients:
    """Everything that people do to a server."""

    def __init__(self, address: str, web: httpx.AsyncClient, client: AsyncClient, tally: Tally) -> None:
        self._address, self._web, self._client, self._tally = address, web, client, tally
        self._draw = random.Random(0)
        self.kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.grpc_good: 30,
            self.http_good: 40,
            self.grpc_cancelled: 8,
            self.http_disconnected: 8,
            self.grpc_refused: 5,
            self.http_refused: 5,
            self.grpc_unread: 1,
            self.http_unread: 1,
            self.garbage: 3,
        }
        """Requests by kind, with the weight with which each is drawn."""

    async def one(self) -> None:
        """Do one of them."""
        [act] = self._draw.choices([*self.kinds], [*self.kinds.values()])
        await act()

    def _body(self, most: int = 48, **more: Any) -> dict[str, Any]:
        words = " ".join(f"w{self._draw.randrange(10, 90)}" for _ in range(self._draw.randint(1, 60)))
        model = self._draw.choice(("base", *ADAPTERS))
        return {"model": model, "prompt": words, "max_tokens": self._draw.randint(1, most), **more}

    async def grpc_good(self) -> None:
        """Read a stream to its end."""
        *_, end = [event async for event in self._client.generate(**self._body(), temperature=1, timeout_s=120)]
        assert isinstance(end, Finished)
        self._tally.entered += 1
        self._tally.ok += 1

    async def http_good(self) -> None:
        """Read events to the last, or wait for a whole answer."""
        stream = self._draw.random() < 0.5
        answer = await self._web.post(PATH, json=self._body(stream=stream, seed=3))
        assert answer.status_code == 200, answer.text
        assert answer.text.endswith("data: [DONE]\n\n") == stream
        self._tally.entered += 1
        self._tally.ok += 1

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
        body = self._body(1000, stream=True, ignore_eos=True)
        async with self._web.stream("POST", PATH, json=body) as answer:
            await anext(answer.aiter_lines())
        self._tally.left()

    async def grpc_refused(self) -> None:
        """Ask for what is out of bounds."""
        with pytest.raises(RequestInvalid):
            await self._client.complete("base", "the river", temperature=-1.0)
        self._tally.entered += 1

    async def http_refused(self) -> None:
        """Ask for what does not exist; what is refused with 400 never enters."""
        body = self._draw.choice(({"temprature": 1}, {"model": "nope"}, {"max_tokens": "many"}))
        answer = await self._web.post(PATH, json=self._body() | body)
        assert answer.status_code == (404 if "model" in body else 400), answer.text
        self._tally.entered += "model" in body

    async def grpc_unread(self) -> None:
        """Stop reading in the middle."""
        body = self._body() | {"max_tokens": 1500}
        events = self._client.generate(**body, logprobs=20, ignore_eos=True)
        with contextlib.suppress(ClientStalled):
            await anext(events)
            await asyncio.sleep(2 * STALL_S)
            async for _ in events:
                pass
        self._tally.left()

    async def http_unread(self) -> None:
        """Ask for much and read nothing."""
        body = json.dumps(self._body(logprobs=5, stream=True, ignore_eos=True) | {"max_tokens": 1500})
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        await self._send(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode(), 4 * STALL_S)
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


@asynccontextmanager
async def clients_of(replica: Service, tally: Tally) -> AsyncIterator[Clients]:
    """Open both kinds of clients."""
    limits = httpx.Limits(max_connections=2 * CONCURRENCY)
    async with (
        httpx.AsyncClient(base_url=f"http://{replica.http}", timeout=120, limits=limits) as web,
        AsyncClient(inference=replica.grpc) as client,
    ):
        yield Clients(replica.http, web, client, tally)


async def drive(replica: Service, tally: Tally) -> list[float]:
    """Keep the clients busy; returns the resident memory of each half minute behind the first minute."""
    began, samples = time.monotonic(), []
    async with clients_of(replica, tally) as clients:

        async def busy() -> None:
            while time.monotonic() < began + 60 * MINUTES:
                await clients.one()

        working = asyncio.gather(*(busy() for _ in range(CONCURRENCY)))
        while not working.done():
            await asyncio.wait([working], timeout=30)
            if time.monotonic() > began + 60:
                samples.append(Held.of(replica).rss_mb)
        await working
    return samples or [0.0]


def total(scrape: Scrape, name: str, **labels: str) -> float:
    """Sum the series of a name with these labels."""
    return sum(value for own, value in scrape.series(name) if labels.items() <= own.items())


async def until_rest(replica: Service) -> Scrape:
    """Wait until the server holds nothing, at most as long as its time-outs say; returns the last scrape."""
    async with httpx.AsyncClient(base_url=f"http://{replica.http}") as web:
        for _ in range(100):
            scrape = Scrape((await web.get("/metrics")).text)
            if not any(total(scrape, name) for name in HOLDINGS):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(2)  # for connections to close
    return scrape


@pytest.mark.sweep
@pytest.mark.timeout(int(60 * MINUTES) + 300)
async def test_a_replica_keeps_its_promises_under_everything(tmp_path: Path) -> None:
    """Each request ends once, nothing is held, memory does not grow, and no descriptor and process is left."""
    checkpoint.write_base(tmp_path / "base", SHAPE, torch.device("cpu"))
    for name in ADAPTERS:
        checkpoint.write_adapter(tmp_path / "adapters" / name, SHAPE, 8, torch.device("cpu"))
    checkpoint.build_deployment(tmp_path, "soak", list(ADAPTERS), 2048)
    replica, tally = replica_process(tmp_path, "soak", stall_timeout_s=STALL_S, kv_memory_gb=KV_GB), Tally()
    try:
        async with clients_of(replica, tally) as clients:
            for act in clients.kinds:
                await act()  # what is opened once, at the first of a kind, is no leak
        await until_rest(replica)
        start = Held.of(replica)
        memory = await drive(replica, tally)
        scrape = await until_rest(replica)
        gc.collect()  # a cancelled call of grpc.aio is part of a cycle, and keeps its client's connection open
        for _ in range(60):  # gRPC takes some seconds to see that a client has gone
            end = Held.of(replica)
            if end.descriptors.total() <= start.descriptors.total():
                break
            await asyncio.sleep(0.5)
    finally:
        status = replica.stop()
    assert status == 0
    ended = Counter(line["id"] for line in replica.logged("request ended"))
    requests = "loramux_requests_total"
    assert total(scrape, requests) == len(ended) == ended.total() == tally.entered
    assert tally.ok <= total(scrape, requests, outcome="OK") <= tally.ok + tally.broken
    assert total(scrape, requests, outcome="INTERNAL") == 0
    assert total(scrape, "loramux_http_responses_total", status="500") == 0
    assert {name: total(scrape, name) for name in HOLDINGS} == dict.fromkeys(HOLDINGS, 0)
    assert max(memory) - memory[0] <= GROWTH_MB
    assert end.descriptors.total() <= start.descriptors.total(), end.descriptors - start.descriptors
    assert end.children <= start.children
