"""Streams of many clients in one process, as cheap as Python has them: nothing of an answer is parsed.

``python -m benchmarks.servers.clients`` opens so many at once, prints when each had its first token, and when
its input ends, the tokens since then.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import grpc

from benchmarks.moving.figures import percentile
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.process import raise_limit

MODEL: Final = "base"
PROMPT: Final = [5, 6, 7, 8]
PATIENCE_S: Final = 20.0
"""Seconds for the first tokens of all; a client without one by then counts as infinitely late."""
METHOD: Final = "/loramux.inference.v1.InferenceService/Generate"


class StreamClient(Protocol):
    """A client of one of the APIs."""

    def ask(self, number: int, tokens: int) -> AsyncIterator[None]:
        """Ask; yields whenever tokens come."""
        ...


class GrpcStreams:
    """Calls on channels in turn, each with a connection of its own."""

    def __init__(self, address: str, channels: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(channels)]
        self._methods = [channel.unary_stream(METHOD) for channel in self._channels]

    async def ask(self, number: int, tokens: int) -> AsyncIterator[None]:
        """Ask on the channel whose turn it is."""
        sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
        request = pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
        started = False
        async for _ in self._methods[number % len(self._methods)](request.SerializeToString()):
            if started:
                yield
            started = True

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(channel.close() for channel in self._channels))


class HttpStreams:
    """Requests with a connection each."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")

    async def ask(self, number: int, tokens: int) -> AsyncIterator[None]:  # noqa: ARG002 - one each
        """Ask for a stream."""
        body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens}
        data = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json"
        )
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        try:
            writer.write(b"%s\r\ncontent-length: %d\r\n\r\n%s" % (head, len(data), data))
            while chunk := await reader.read(1 << 16):
                if b"data: " in chunk:
                    yield
        finally:
            writer.close()

    async def close(self) -> None:
        """Nothing is kept."""


@asynccontextmanager
async def clients_of(kind: str, address: str, channels: int) -> AsyncIterator[StreamClient]:
    """Open an API's clients for as long as the block takes."""
    made = HttpStreams(address) if kind == "http" else GrpcStreams(address, channels)
    try:
        yield made
    finally:
        await made.close()


async def first_tokens_s(client: StreamClient, count: int, tokens: int) -> list[float]:
    """Ask so many times at once and read to the ends; return the seconds to the first tokens."""
    tasks = [asyncio.create_task(_Stream().read(client, number, tokens)) for number in range(count)]
    began = time.perf_counter()
    await asyncio.gather(*tasks)
    return [task.result().first_s - began for task in tasks]


class _Stream:
    """The results of a stream."""

    def __init__(self) -> None:
        self.first_s = math.inf
        self.last_s = 0.0
        self.gaps_s: list[float] = []

    async def read(self, client: StreamClient, number: int, tokens: int) -> _Stream:
        """Read to the end."""
        async for _ in client.ask(number, tokens):
            now = time.perf_counter()
            if self.last_s:
                self.gaps_s.append(now - self.last_s)
            else:
                self.first_s = now
            self.last_s = now
        return self


@dataclass(frozen=True)
class Steady:
    """Streams that run on."""

    messages_per_s: float
    gap_p50_s: float
    gap_p99_s: float
    cpu: float
    """Seconds of a core per second, of the clients."""


async def run(client: StreamClient, streams: int, tokens: int) -> None:
    """Open streams, and tell of them."""
    made = [_Stream() for _ in range(streams)]
    began = time.perf_counter()
    tasks = [asyncio.create_task(each.read(client, number, tokens)) for number, each in enumerate(made)]
    while time.perf_counter() - began < PATIENCE_S and not all(each.last_s for each in made):
        await asyncio.sleep(0.05)
    print(json.dumps([each.first_s - began for each in made]), flush=True)
    for each in made:
        each.gaps_s.clear()
    since, cpu_s = time.perf_counter(), time.process_time()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()
    gaps = [gap for each in made for gap in each.gaps_s] or [math.inf]
    seconds = time.perf_counter() - since
    cpu = (time.process_time() - cpu_s) / seconds
    found = Steady(len(gaps) / seconds, percentile(gaps, 0.5), percentile(gaps, 0.99), cpu)
    print(json.dumps(asdict(found)), flush=True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _main(options: argparse.Namespace) -> None:
    raise_limit()
    gc.freeze()
    async with clients_of(options.api, options.address, options.channels) as opened:
        await run(opened, options.streams, options.tokens)


def main() -> None:
    """Run the streams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--api", choices=("grpc", "http"), required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
