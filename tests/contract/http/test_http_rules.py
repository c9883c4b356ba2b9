"""Requests that RFC 9112 calls ambiguous for two servers, over a raw socket; and rules of all routes."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from inference_service.http.app import create_app
from inference_service.http.server import HttpServer
from inference_service.http.wire.protocol import MAX_FIELDS, MAX_PIPELINED, MAX_TARGET_BYTES
from inference_service.serving.service import GenerationService
from tests.support.cases import cases
from tests.support.raw_http import RawClient
from tests.support.silent import silent_service
from tests.support.waiting import BOUND_S


def get(fields: bytes = b"Host: localhost\r\n", path: bytes = b"/health") -> bytes:
    """A request without a body."""
    return b"GET " + path + b" HTTP/1.1\r\n" + fields + b"\r\n"


TAKEN = {name: request.encode("latin-1") for name, request in cases(__file__, "taken").items()}


def post(trailers: bytes) -> bytes:
    """A request with a body in chunks, and fields behind it."""
    return TAKEN["chunks"][:-2] + trailers + b"\r\n"


REFUSED = {
    **{name: (raw.encode("latin-1"), status) for name, (status, raw) in cases(__file__, "refused").items()},
    "long target": (get(path=b"/" + b"a" * MAX_TARGET_BYTES), 431),
    "many headers": (get(b"Host: localhost\r\n" + b"a: b\r\n" * MAX_FIELDS), 431),
    "many trailers": (post(b"a: b\r\n" * (MAX_FIELDS + 2)), 431),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> GenerationService:
    """A service that tokenizes and does not generate."""
    return silent_service(tmp_path_factory.mktemp("text"))


@pytest_asyncio.fixture
async def client(service: GenerationService) -> AsyncIterator[RawClient]:
    """A connection to the HTTP API."""
    server = HttpServer("127.0.0.1:0", service)
    client = await RawClient.open(await server.start())
    yield client
    client.close()
    assert await server.drain(BOUND_S)


@pytest.mark.parametrize("case", TAKEN)
async def test_what_has_one_reading_is_answered(client: RawClient, case: str) -> None:
    """The request is understood."""
    pytest.importorskip("loramux_compat")
    await client.send(TAKEN[case])
    status, body = await client.answer()
    assert status == 200
    assert not body or json.loads(body).get("count", 2) == 2  # health counts nothing


@pytest.mark.parametrize("case", REFUSED)
async def test_what_has_two_readings_is_refused(client: RawClient, case: str) -> None:
    """The refusal is JSON, and the connection ends, so that no smuggled request is read."""
    raw, expected = REFUSED[case]
    await client.send(raw + get(path=b"/version"))
    status, body = await client.answer()
    assert status == expected
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert await client.ended() == b""


async def test_requests_may_come_before_the_answers(client: RawClient) -> None:
    """Pipelined requests are answered in order, also after an upgrade that the server ignores."""
    await client.send(TAKEN["an upgrade that is not taken up"] + get(path=b"/version") + get(path=b"/nope"))
    assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 404]


async def test_few_requests_wait_on_a_connection(client: RawClient) -> None:
    """The server closes a connection that sends hundreds of requests without reading."""
    await client.send(get() * (2 * MAX_PIPELINED))
    assert (await client.ended()).count(b"HTTP/1.1") <= MAX_PIPELINED


async def test_a_trailer_is_no_header(client: RawClient) -> None:
    """A field behind the body does not become part of the head, such as the request's id."""
    pytest.importorskip("loramux_compat")
    await client.send(post(b"X-Request-Id: mine\r\n"))
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"mine" not in head


@pytest_asyncio.fixture
async def web(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API that cannot generate."""
    transport = httpx.ASGITransport(create_app(silent_service(tmp_path)))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


@pytest.mark.parametrize(("query", "param", "problem"), cases(__file__, "QUERIES"))
async def test_a_query_is_read_as_strictly_as_a_body(
    web: httpx.AsyncClient, query: str, param: str, problem: str
) -> None:
    """An unknown name, a wrong value and a name that comes twice are refused by name."""
    answer = await web.get(f"/v1/adapters?{query}")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"] == f"the query of the request is not valid. {param}: {problem}"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("secret", "a text of 6 characters"),
        (["secret"], "a list of 1 item"),
        ({"a": 1}, "an object"),
        (True, "true"),
        (10**40, "a larger number"),
    ],
)
async def test_a_wrong_type_is_found_not_its_text(web: httpx.AsyncClient, value: object, found: str) -> None:
    """A text may be a prompt; its length is named instead."""
    answer = await web.post("/v1/completions", json={"model": "m", "prompt": "p", "priority": value})
    assert answer.json()["error"]["message"].endswith(f", found {found}")
