"""Requests to every API that are mutated, hold numbers at their limits, or are as large as they may be.

Each gets an answer or a named fault, in little memory; nothing is a failure of the server's.
"""

import json
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from inference_service.api.http.admin.operators import LoadBody
from inference_service.api.requests.bounds import MAX_NAMES
from inference_service.api.rpc.servicer import SERVICE_NAME
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from tests.fuzz.apis import BODIES, KINDS, METHODS, FuzzedApis, mutate, number_each, open_apis
from tests.fuzz.mutate import bounded, json_text, mutated_json
from tests.fuzz.numbers import HOLE, LITERALS, in_turn, json_fields

pytestmark = pytest.mark.asyncio(loop_scope="module")
SWEEP = (pytest.mark.sweep, pytest.mark.timeout(1800))
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def apis(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FuzzedApis]:
    async with open_apis(tmp_path_factory.mktemp("apis")) as opened:
        # What a process makes once, at the first long text, is no leak.
        assert await opened.post(PLAIN, LARGE_BODIES["text"][1]()) == TOO_LONG
        yield opened


async def test_nothing_is_left_out(apis: FuzzedApis) -> None:
    """Each route that reads JSON and each rpc of both services has a valid request to start from."""
    assert {path: kind for path, (kind, _) in BODIES.items()} == KINDS
    assert set(apis.messages) == set(METHODS)


RUNS = [
    pytest.param(range(150), id="short"),
    # In two parts, each with the memory that a run may take: in the first, libraries fill their caches.
    pytest.param(range(2000), marks=SWEEP, id="long"),
    pytest.param(range(2000, 20_000), marks=SWEEP, id="longest"),
]


@pytest.mark.parametrize("cases", RUNS)
async def test_mutated_bodies(apis: FuzzedApis, cases: range) -> None:
    """A mutated body, whose case is its seed, is answered or refused by name."""
    with bounded() as watch:
        for number in cases:
            rng = Random(number)
            path = rng.choice(sorted(BODIES))
            body = json_text(mutated_json(BODIES[path][1], rng), rng)
            with watch.case(f"{path} {number}"):
                watch.note(await apis.post(path, body))
    assert watch.outcomes["OK"] > len(cases) / 100


@pytest.mark.parametrize("cases", RUNS)
async def test_mutated_messages(apis: FuzzedApis, cases: range) -> None:
    """A mutated gRPC message is never INTERNAL, and every refusal has a reason."""
    await mutate(apis.messages, apis.call, cases)


@pytest.mark.parametrize("stream", [False, True])
async def test_numbers_in_json(apis: FuzzedApis, stream: bool) -> None:
    """Any number that a client writes gets an answer or the name of the error."""
    with bounded() as watch:
        kinds = {kind: (path, valid) for path, (kind, valid) in BODIES.items()}
        for kind, (path, valid) in kinds.items():
            if stream and "stream" not in kind.model_fields:
                continue
            fields = list(json_fields(kind))
            assert fields or kind is LoadBody  # which has none
            for turn, (place, name, value) in enumerate(fields):
                text = json.dumps(valid | {name: value} | ({"stream": True} if stream else {}))
                assert str(HOLE) in text
                for literal in in_turn(LITERALS, turn, 30 if stream else 14):
                    with watch.case(f"{path} {place} {literal:.40}"):
                        watch.note(await apis.post(path, text.replace(str(HOLE), literal).encode()))
    assert len(watch.outcomes) > 1


@pytest.mark.parametrize("method", METHODS)
async def test_numbers_on_the_wire(apis: FuzzedApis, method: str) -> None:
    """The same over gRPC, with bytes that a client's own library would not write."""
    await number_each(method, apis.messages[method], apis.call)


ROOM = MAX_REQUEST_BYTES - 300
TOO_LONG, TOO_MUCH, MISSING = "context_length_exceeded", "request_invalid", "missing_required_parameter"
GROWTH = 96 << 20
"""Bytes: a body is there as bytes, as text and parsed, and threads have heaps of their own."""


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "base", "messages": [{"role": "user", "content": "x"}]} | fields).encode()


def filled(before: str, element: str, after: str = "}") -> bytes:
    count = (ROOM - len(before) - len(after)) // (len(element) + 1)
    return (before + ",".join([element] * count) + after).encode()


def keys(count: int) -> bytes:
    """Return an object of many unknown keys."""
    return ("{" + ",".join(f'"k{number}":0' for number in range(count)) + "}").encode()


CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": "[" + "[]," * (ROOM // 4)}}
LARGE_BODIES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "text": (PLAIN, lambda: filled('{"model":"base","prompt":"', "ab cd", '"}'), TOO_LONG),
    "ids": (PLAIN, lambda: filled('{"model":"base","prompt":[', "77777", "]}"), TOO_MUCH),
    "fewer ids": (PLAIN, lambda: json.dumps({"model": "base", "prompt": [7] * 10**6}).encode(), TOO_LONG),
    "detokenize": ("/detokenize", lambda: json.dumps({"tokens": [7] * 10**6}).encode(), "invalid_value"),
    "fewer keys": (CHAT, lambda: keys(MAX_NAMES - 9), MISSING),
    "arguments": (CHAT, lambda: chat(messages=[{"role": "assistant", "tool_calls": [CALL]}]), TOO_MUCH),
    "stops": (CHAT, lambda: chat(stop=["a"] * 900_000), "invalid_value"),
    "a number": (CHAT, lambda: chat(n=123).replace(b"123", b"1" * (ROOM - 99)), TOO_MUCH),
}


@pytest.mark.parametrize("name", [name for name, (path, _, _) in LARGE_BODIES.items() if path in BODIES])
async def test_large_bodies(apis: FuzzedApis, name: str) -> None:
    """A body of 8 MB is refused with a reason, in little memory."""
    path, made, expected = LARGE_BODIES[name]
    body = made()
    assert len(body) <= MAX_REQUEST_BYTES
    with bounded(growth=GROWTH) as watch, watch.case(name):
        assert await apis.post(path, body) == expected


def field(number: int, content: bytes) -> bytes:
    size, made = len(content), bytearray([number << 3 | 2])
    while size > 0x7F:
        made.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(made) + bytes([size]) + content


LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: field(2, b"ab " * (ROOM // 3)), "PROMPT_TOO_LONG"),
    "ids": (lambda: field(3, field(1, b"\x07" * ROOM)), "PROMPT_TOO_LONG"),
    "messages": (lambda: field(4, b"\x0a\x00" * (ROOM // 2)), "REQUEST_INVALID"),
    "unknown fields": (lambda: b"\x78\x00" * (ROOM // 2), "REQUEST_INVALID"),
    "parameters": (
        lambda: field(4, field(2, field(1, b"f") + field(3, b"[" + b"[]," * (ROOM // 3)))),
        "REQUEST_INVALID",
    ),
}


@pytest.mark.parametrize("name", LARGE)
async def test_large_messages(apis: FuzzedApis, name: str) -> None:
    """A message of 8 MB is refused with a reason, in little memory."""
    made, expected = LARGE[name]
    request = field(1, b"base") + made()
    assert len(request) <= MAX_REQUEST_BYTES
    with bounded(growth=GROWTH) as watch, watch.case(name):
        assert await apis.call(f"/{SERVICE_NAME}/Generate", request) == expected


async def test_many_adapters(apis: FuzzedApis) -> None:
    """A deployment of thousands of adapters that all break a rule is refused as a whole, and names a few."""
    adapter = field(3, field(1, b"a b"))
    spec = field(1, field(1, b"x") + adapter * 12_000)
    with bounded() as watch, watch.case("adapters"):
        outcome = await apis.call("/loramux.builder.v1.BuilderService/BuildDeployment", spec)
    assert outcome == "DEPLOYMENT_INVALID"
