"""Streams of many clients in one process, as cheap as Python has them: nothing of an answer is parsed.

``python -m benchmarks.streams_clients API ADDRESS CHANNELS STREAMS`` opens so many at once, prints the seconds
to the first token of each, and reads until it is killed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.process import raise_limit

MODEL: Final = "base"
PROMPT: Final = [5, 6, 7, 8]
LONG: Final = 6000
"""Tokens of the streams that run on."""
PATIENCE_S: Final = 20.0
"""Seconds for the first tokens of all; a client without one by then counts as infinitely late."""
METHOD: Final = "/loramux.inference.v1.InferenceService/Generate"

Streams = Callable[[int, int], AsyncIterator[None]]
"""The number of a stream and of its tokens to an iterator that yields whenever tokens come."""


@asynccontextmanager
async def opened(kind: str, address: str, channels: int) -> AsyncIterator[Streams]:
    """Open an API's clients for as long as the block takes; HTTP's have a connection each."""
    if kind == "http":
        yield lambda _number, tokens: _over_http(address, tokens)
        return
    options = [("grpc.use_local_subchannel_pool", 1)]
    made = [grpc.aio.insecure_channel(address, options) for _ in range(channels)]
    methods = [channel.unary_stream(METHOD) for channel in made]

    async def over_grpc(number: int, tokens: int) -> AsyncIterator[None]:
        sampling = pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
        request = pb.GenerateRequest(model=MODEL, token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling)
        started = False
        async for _ in methods[number % channels](request.SerializeToString()):
            if started:
                yield
            started = True

    try:
        yield over_grpc
    finally:
        await asyncio.gather(*(channel.close() for channel in made))


async def _over_http(address: str, tokens: int) -> AsyncIterator[None]:
    body: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens}
    data = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json"
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"%s\r\ncontent-length: %d\r\n\r\n%s" % (head, len(data), data))
        while received := await reader.read(1 << 16):
            if b"data: " in received:
                yield
    finally:
        writer.close()


async def first_tokens_s(streams: Streams, count: int, tokens: int) -> list[float]:
    """Ask so many times at once and read to the ends; return the seconds to the first tokens."""
    firsts, reading = _read(streams, count, tokens)
    await reading
    return firsts


def _read(streams: Streams, count: int, tokens: int) -> tuple[list[float], asyncio.Future[list[None]]]:
    """Ask so many times at once; return the seconds to the first tokens, as they come, and the reading."""
    began, firsts = time.perf_counter(), [math.inf] * count

    async def read(number: int) -> None:
        async for _ in streams(number, tokens):
            if firsts[number] == math.inf:
                firsts[number] = time.perf_counter() - began

    return firsts, asyncio.gather(*(read(number) for number in range(count)))


async def _main(kind: str, address: str, channels: int, count: int) -> None:
    raise_limit()
    gc.freeze()
    async with opened(kind, address, channels) as streams:
        firsts, reading = _read(streams, count, LONG)
        ends_s = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < ends_s and math.inf in firsts:
            await asyncio.sleep(0.05)
        print(json.dumps(firsts), flush=True)
        await reading


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
