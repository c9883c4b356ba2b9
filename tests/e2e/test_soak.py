"""A replica under good, bad, cancelled, slow and broken requests, over both APIs.

SOAK_MINUTES says for how long; without it, it is a third of a minute, which is too short for memory to count.
"""

import asyncio
import gc
import json
import os
import random
import time
from collections import Counter
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

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
from tests.support.raw_http import RawClient
from tests.support.waiting import BOUND_S

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.33"))
CONCURRENCY = 8
SHAPE = TINY | {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
MODELS = ("base", "lora0", "lora1", "lora2", "lora3")
STALL_S = 2
"""Seconds that the replica waits for a client that does not read."""
KV_GB = 0.1
"""Size of the cache: every block is used in the first minute, so that a cache that fills is no leak."""
GROWTH_MB = 64
"""Bound of the increase of resident memory after the first minute."""
PATH = "/v1/completions"
HOLDINGS = ("loramux_sequences_running", "loramux_sequences_waiting", "loramux_kv_cache_blocks_used")
HALVES = (b"\x16\x03\x01", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nhost: localhost\r\n", b"")


class Clients:
    """Everything that people do to a server, and how often its metrics must have counted it."""

    def __init__(self, replica: Service) -> None:
        limits = httpx.Limits(max_connections=2 * CONCURRENCY)
        self.web = httpx.AsyncClient(base_url=f"http://{replica.http}", timeout=120, limits=limits)
        self.grpc = AsyncClient(inference=replica.grpc)
        self.address, self.draw = replica.http, random.Random(0)
        self.counts: Counter[str] = Counter()
        """``entered`` the engine's API; ``ok``, as a client saw; ``left``: the server may have been faster."""
        self.kinds = {self.read: 35, self.leave: 8, self.ask_wrong: 5, self.stall: 1, self.send_half: 2}
        """Requests by kind, with the weight with which each is drawn."""

    async def one(self) -> None:
        [act] = self.draw.choices([*self.kinds], [*self.kinds.values()])
        await act(self.draw.random() < 0.5)

    def body(self, most: int = 48) -> dict[str, Any]:
        words = " ".join(f"w{self.draw.randrange(10, 90)}" for _ in range(self.draw.randint(1, 60)))
        return {"model": self.draw.choice(MODELS), "prompt": words, "max_tokens": self.draw.randint(1, most)}

    async def read(self, http: bool) -> None:
        """Read a stream to its end, or wait for a whole answer."""
        if http:
            stream = self.draw.random() < 0.5
            answer = await self.web.post(PATH, json=self.body() | {"stream": stream, "seed": 3})
            assert answer.status_code == 200, answer.text
            assert answer.text.endswith("data: [DONE]\n\n") == stream
        else:
            *_, end = [event async for event in self.grpc.generate(**self.body(), temperature=1, timeout_s=120)]
            assert isinstance(end, Finished)
        self.counts.update(["entered", "ok"])

    async def leave(self, http: bool) -> None:
        """Cancel after a few messages, or close the connection."""
        body = self.body(1000) | {"ignore_eos": True}
        if http:
            async with self.web.stream("POST", PATH, json=body | {"stream": True}) as answer:
                await anext(answer.aiter_lines())
        else:
            events = self.grpc.generate(**body)
            for _ in range(self.draw.randint(1, 8)):
                await anext(events, None)
            await events.aclose()
        self.counts.update(["entered", "left"])

    async def ask_wrong(self, http: bool) -> None:
        """Ask for what is out of bounds or does not exist; a body that HTTP refuses never enters."""
        if http:
            body = self.draw.choice(({"temprature": 1}, {"model": "nope"}, {"max_tokens": "many"}))
            answer = await self.web.post(PATH, json=self.body() | body)
            assert answer.status_code == (404 if "model" in body else 400), answer.text
            self.counts["entered"] += "model" in body
        else:
            with pytest.raises(RequestInvalid):
                await self.grpc.complete("base", "the river", temperature=-1.0)
            self.counts["entered"] += 1

    async def stall(self, http: bool) -> None:
        """Ask for much, and stop reading."""
        body = self.body() | {"max_tokens": 1500, "ignore_eos": True}
        if http:
            content = json.dumps(body | {"logprobs": 5, "stream": True}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            await self._send(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content, 4 * STALL_S)
        else:
            events = self.grpc.generate(**body, logprobs=20)
            with suppress(ClientStalled):
                await anext(events)
                await asyncio.sleep(2 * STALL_S)
                _ = [event async for event in events]
        self.counts.update(["entered", "left"])

    async def send_half(self, _http: bool) -> None:
        """Send what is no request, or half of one, and go away."""
        await self._send(self.draw.choice(HALVES), self.draw.random() / 10)

    async def _send(self, data: bytes, stays_s: float) -> None:
        client = await RawClient.open(self.address)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(data)
        await asyncio.sleep(stays_s)
        client.writer.transport.abort()


async def drive(replica: Service, clients: Clients) -> list[float]:
    """Keep the clients busy; returns the resident memory of each half minute behind the first minute."""
    began, samples = time.monotonic(), []

    async def busy() -> None:
        while time.monotonic() < began + 60 * MINUTES:
            await clients.one()

    working = asyncio.gather(*(busy() for _ in range(CONCURRENCY)))
    while not working.done():
        await asyncio.wait([working], timeout=30)
        if time.monotonic() > began + 60:
            samples.append(replica.process.memory_info().rss / 1e6)
    await working
    return samples or [0.0]


def total(scrape: Scrape, name: str, **labels: str) -> float:
    return sum(value for own, value in scrape.series(name) if labels.items() <= own.items())


async def rested(replica: Service) -> Scrape:
    """Wait until the server holds nothing, at most as long as its time-outs say; returns the last scrape."""
    async with httpx.AsyncClient(base_url=f"http://{replica.http}", timeout=BOUND_S) as web:
        for _ in range(100):
            scrape = Scrape((await web.get("/metrics")).text)
            if not any(total(scrape, name) for name in HOLDINGS):
                break
            await asyncio.sleep(0.2)
    await asyncio.sleep(2)  # for connections to close
    return scrape


def held(replica: Service) -> tuple[int, int]:
    """Return how many descriptors and children the server's process has."""
    return replica.process.num_fds(), len(replica.process.children(recursive=True))


@pytest.mark.sweep
@pytest.mark.timeout(int(60 * MINUTES) + 300)
async def test_a_replica_keeps_its_promises_under_everything(tmp_path: Path) -> None:
    """Each request ends once, nothing is held, memory does not grow, and no descriptor and process is left."""
    checkpoint.write_base(tmp_path / "base", SHAPE, torch.device("cpu"))
    for name in MODELS[1:]:
        checkpoint.write_adapter(tmp_path / "adapters" / name, SHAPE, 8, torch.device("cpu"))
    checkpoint.build_deployment(tmp_path, "soak", list(MODELS[1:]), 2048)
    replica = replica_process(tmp_path, "soak", stall_timeout_s=STALL_S, kv_memory_gb=KV_GB)
    clients = Clients(replica)
    try:
        async with clients.web, clients.grpc:
            for act, http in product(clients.kinds, (True, False)):
                await act(http)  # what is opened once, at the first of a kind, is no leak
        await rested(replica)
        before, counts = held(replica), clients.counts
        clients = Clients(replica)
        async with clients.web, clients.grpc:
            memory = await drive(replica, clients)
        scrape, counts = await rested(replica), counts + clients.counts
        gc.collect()  # a cancelled call of grpc.aio is part of a cycle, and keeps its client's connection open
        for _ in range(60):  # gRPC takes some seconds to see that a client has gone
            if (after := held(replica)) <= before:
                break
            await asyncio.sleep(0.5)
    finally:
        status = replica.stop()
    assert status == 0
    ended = Counter(line["id"] for line in replica.logged("request ended"))
    requests = "loramux_requests_total"
    assert total(scrape, requests) == len(ended) == ended.total() == counts["entered"]
    assert counts["ok"] <= total(scrape, requests, outcome="OK") <= counts["ok"] + counts["left"]
    assert total(scrape, requests, outcome="INTERNAL") == 0
    assert total(scrape, "loramux_http_responses_total", status="500") == 0
    assert {name: total(scrape, name) for name in HOLDINGS} == dict.fromkeys(HOLDINGS, 0)
    assert max(memory) - memory[0] <= GROWTH_MB
    assert after[0] <= before[0]
    assert after[1] <= before[1]
