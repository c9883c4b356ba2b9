"""Requests as large as they may be, and of what unfolds most: refused soon, while others are answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio

from inference_service.rpc.servicer import SERVICE_NAME
from inference_service.serving.json_size import MAX_NAMES
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from loramux_shared.rpc.wire import MAX_FIELDS
from tests.fuzz.doors import Doors, open_doors
from tests.fuzz.mutate import bounded

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOM = MAX_REQUEST_BYTES - 300
TOO_LONG, TOO_MUCH = "context_length_exceeded", "request_invalid"
GROWTH = 96 << 20
"""Bytes: a body is there as bytes, as text and parsed, and threads have heaps of their own."""
UNSEEN_S = 1.0
"""For which the event loop may answer nobody, on a machine that does other things too."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    """All doors."""
    async with open_doors(tmp_path_factory.mktemp("doors")) as opened:
        # What a process makes once, at the first long text, is no growth.
        assert await opened.post(PLAIN, BODIES["text"][1]()) == TOO_LONG
        yield opened


async def while_others_ask(doors: Doors, ask: Callable[[], Awaitable[str]]) -> str:
    """Return an outcome; meanwhile the door has to answer others."""
    asked = asyncio.ensure_future(ask())
    while not asked.done():
        begin = time.perf_counter()
        assert (await doors.web.get("/health")).status_code == 200
        assert time.perf_counter() - begin < UNSEEN_S
        await asyncio.sleep(0.002)
    return await asked


def chat(**fields: Any) -> bytes:
    """A chat's body."""
    return json.dumps({"model": "base", "messages": [{"role": "user", "content": "x"}]} | fields).encode()


def filled(before: str, element: str, after: str = "}") -> bytes:
    """A body full of an element."""
    count = (ROOM - len(before) - len(after)) // (len(element) + 1)
    return (before + ",".join([element] * count) + after).encode()


def keys(count: int) -> bytes:
    """An object of many keys that nobody knows."""
    return ("{" + ",".join(f'"k{number}":0' for number in range(count)) + "}").encode()


CHAT, PLAIN, MISSING = "/v1/chat/completions", "/v1/completions", "missing_required_parameter"
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": "[" + "[]," * (ROOM // 4)}}
SAID = {"role": "user", "content": "ab " * (ROOM // 3 - 99)}
BODIES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "text": (PLAIN, lambda: filled('{"model":"base","prompt":"', "ab cd", '"}'), TOO_LONG),
    "one word": (PLAIN, lambda: filled('{"model":"base","prompt":"', "a" * 1000, '"}'), TOO_LONG),
    "messages": (CHAT, lambda: chat(messages=[SAID]), TOO_LONG),
    "tokenize": ("/tokenize", lambda: filled('{"prompt":"', "ab cd", '"}'), TOO_LONG),
    "ids": (PLAIN, lambda: filled('{"model":"base","prompt":[', "77777", "]}"), TOO_MUCH),
    "fewer ids": (PLAIN, lambda: json.dumps({"model": "base", "prompt": [7] * 10**6}).encode(), TOO_LONG),
    "detokenize": ("/detokenize", lambda: json.dumps({"tokens": [7] * 10**6}).encode(), "invalid_value"),
    "keys": (CHAT, lambda: keys(500_000), TOO_MUCH),
    "fewer keys": (CHAT, lambda: keys(MAX_NAMES - 9), MISSING),
    "a long key": (CHAT, lambda: filled('{"', "max_tokens", '":1}'), MISSING),
    "no messages": (CHAT, lambda: filled('{"model":"base","messages":[', "{}", "]}"), TOO_MUCH),
    "lists": (CHAT, lambda: filled('{"model":"base","metadata":{"x":[', "[]", "]}}"), TOO_MUCH),
    "arguments": (CHAT, lambda: chat(messages=[{"role": "assistant", "tool_calls": [CALL]}]), TOO_MUCH),
    "stops": (CHAT, lambda: chat(stop=["a"] * 900_000), "invalid_value"),
    "a number": (CHAT, lambda: chat(n=123).replace(b"123", b"1" * (ROOM - 99)), TOO_MUCH),
}


@pytest.mark.parametrize("name", BODIES)
async def test_bodies(doors: Doors, name: str) -> None:
    """A body of 8 MB is refused with a reason, in little time and memory."""
    path, made, expected = BODIES[name]
    body = made()
    assert len(body) <= MAX_REQUEST_BYTES
    with bounded(growth=GROWTH) as watch, watch.case(name):
        assert await while_others_ask(doors, lambda: doors.post(path, body)) == expected


def field(number: int, content: bytes) -> bytes:
    """A field of bytes on the wire."""
    size, made = len(content), bytearray([number << 3 | 2])
    while size > 0x7F:
        made.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(made) + bytes([size]) + content


REQUESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: field(2, b"ab " * (ROOM // 3)), "PROMPT_TOO_LONG"),
    "ids": (lambda: field(3, field(1, b"\x07" * ROOM)), "PROMPT_TOO_LONG"),
    "messages": (lambda: field(4, b"\x0a\x00" * (ROOM // 2)), "REQUEST_INVALID"),
    "tools": (lambda: field(4, b"\x12\x00" * (ROOM // 2)), "REQUEST_INVALID"),
    "stops": (lambda: field(5, b"\x32\x00" * (ROOM // 2)), "REQUEST_INVALID"),
    "unknown fields": (lambda: b"\x78\x00" * (ROOM // 2), "REQUEST_INVALID"),
    "fewer messages": (lambda: field(4, b"\x0a\x00" * (MAX_FIELDS - 9)), "REQUEST_INVALID"),
    "parameters": (
        lambda: field(4, field(2, field(1, b"f") + field(3, b"[" + b"[]," * (ROOM // 3)))),
        "REQUEST_INVALID",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_requests(doors: Doors, name: str) -> None:
    """A message of 8 MB is refused with a reason, in little time and memory."""
    made, expected = REQUESTS[name]
    request = field(1, b"base") + made()
    assert len(request) <= MAX_REQUEST_BYTES
    with bounded(growth=GROWTH) as watch, watch.case(name):
        outcome = await while_others_ask(doors, lambda: doors.call(f"/{SERVICE_NAME}/Generate", request))
        assert outcome == expected


async def test_many_adapters(doors: Doors) -> None:
    """A deployment of thousands of adapters that all break a rule is refused as a whole, and names a few."""
    adapter = field(3, field(1, b"a b"))
    spec = field(1, field(1, b"x") + adapter * 12_000)
    with bounded() as watch, watch.case("adapters"):
        outcome = await doors.call("/loramux.builder.v1.BuilderService/BuildDeployment", spec)
    assert outcome == "DEPLOYMENT_INVALID"
