"""Requests that RFC 9112 calls ambiguous for two servers, over a raw socket; and rules of all routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from inference_service.http.app import create_app
from inference_service.http.server import HttpServer
from inference_service.http.wire.protocol import MAX_FIELDS, MAX_PIPELINED
from inference_service.serving.service import GenerationService
from tests.support.raw_http import JSON, RawClient
from tests.support.silent import silent_service
from tests.support.waiting import BOUND_S

BODY = b'{"model": "base", "prompt": "HI"}'
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def get(fields: bytes = b"Host: x\r\n", line: bytes = b"GET /health HTTP/1.1") -> bytes:
    """A request without a body."""
    return line + b"\r\n" + fields + b"\r\n"


def post(fields: bytes, body: bytes, version: bytes = b"1.1") -> bytes:
    """A request with a body."""
    return b"POST /tokenize HTTP/" + version + b"\r\n" + JSON + fields + b"\r\n" + body


TAKEN = {
    "a plain request": get(),
    "a length": post(LENGTH, BODY),
    "chunks": post(CHUNKED, CHUNKS),
    "a coding in capitals": post(b"Transfer-Encoding:\tCHUNKED\r\n", CHUNKS),
    "chunk extensions": post(CHUNKED, CHUNKS.replace(b"\r\n", b";a=b\r\n", 1)),
    "trailers": post(CHUNKED, CHUNKS[:-2] + b"X-A: b\r\n\r\n"),
    "an empty host": get(b"Host:\r\n"),
    "a host of IPv6": get(b"Host: [::1]:8000\r\n"),
    "HTTP/1.0 without a host": get(b"", b"GET /health HTTP/1.0"),
    "the absolute form": get(line=b"GET http://x/health HTTP/1.1"),
    "empty lines before": b"\r\n\r\n" + get(),
    "an upgrade that is not taken up": get(b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"),
    "a body that is announced": post(LENGTH + b"TE: trailers\r\n", BODY),
    "bytes above ASCII in a value": get(b"Host: x\r\nX-A: \xff\r\n"),
}
REFUSED = {
    "no host": (get(b""), 400),
    "two hosts": (get(b"Host: x\r\nHost: x\r\n"), 400),
    "a host with a space": (get(b"Host: a b\r\n"), 400),
    "a host with a path": (get(b"Host: a/b\r\n"), 400),
    "a host with a user": (get(b"Host: u@b\r\n"), 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 505),
    "HTTP/2.0": (get(line=b"GET /health HTTP/2.0"), 505),
    "HTTP/1.2": (get(line=b"GET /health HTTP/1.2"), 400),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400),
    "gzip, chunked": (post(b"Transfer-Encoding: gzip, chunked\r\n", CHUNKS), 501),
    "chunked, gzip": (post(b"Transfer-Encoding: chunked, gzip\r\n", CHUNKS), 400),
    "chunked twice": (post(CHUNKED * 2, CHUNKS), 400),
    "chunked, chunked": (post(b"Transfer-Encoding: chunked, chunked\r\n", CHUNKS), 400),
    "identity": (post(b"Transfer-Encoding: identity\r\n", b""), 501),
    "xchunked": (post(b"Transfer-Encoding: xchunked\r\n", CHUNKS), 501),
    "quoted chunked": (post(b'Transfer-Encoding: "chunked"\r\n', CHUNKS), 501),
    "an empty coding": (post(b"Transfer-Encoding:\r\n", CHUNKS), 400),
    "a vertical tab before chunked": (post(b"Transfer-Encoding: \x0bchunked\r\n", CHUNKS), 400),
    "chunks in HTTP/1.0": (post(CHUNKED, CHUNKS, b"1.0"), 400),
    "length and coding": (post(LENGTH + CHUNKED, CHUNKS), 400),
    "coding and length": (post(CHUNKED + LENGTH, CHUNKS), 400),
    "two lengths": (post(LENGTH + b"Content-Length: 3\r\n", BODY), 400),
    "one length twice": (post(LENGTH * 2, BODY), 400),
    "a list of lengths": (post(b"Content-Length: 33, 33\r\n", BODY), 400),
    "a signed length": (post(b"Content-Length: +33\r\n", BODY), 400),
    "a length in hex": (post(b"Content-Length: 0x21\r\n", BODY), 400),
    "a length without end": (post(b"Content-Length: " + b"9" * 30 + b"\r\n", BODY), 400),
    "an empty length": (post(b"Content-Length:\r\n", BODY), 400),
    "a folded value": (get(b"Host: x\r\nX-A: b\r\n c\r\n"), 400),
    "a folded coding": (post(b"Transfer-Encoding:\r\n chunked\r\n", CHUNKS), 400),
    "a folded first line": (get(b" Host: x\r\n"), 400),
    "bare line feeds": (b"GET /health HTTP/1.1\nHost: x\n\n", 400),
    "one bare line feed": (get(b"Host: x\nX-A: b\r\n"), 400),
    "a bare carriage return": (get(b"Host: x\rX-A: b\r\n"), 400),
    "a space before the colon": (get(b"Host: x\r\nX-A : b\r\n"), 400),
    "a space in a name": (get(b"Host: x\r\nX A: b\r\n"), 400),
    "an empty name": (get(b"Host: x\r\n: b\r\n"), 400),
    "no colon": (get(b"Host: x\r\nX-A\r\n"), 400),
    "a zero in a name": (get(b"Host: x\r\nX\x00A: b\r\n"), 400),
    "a brace in a name": (get(b"Host: x\r\nX(A): b\r\n"), 400),
    "a zero in a value": (get(b"Host: x\r\nX-A: a\x00b\r\n"), 400),
    "a control in a value": (get(b"Host: x\r\nX-A: a\x01b\r\n"), 400),
    "CONNECT": (get(line=b"CONNECT x:80 HTTP/1.1"), 400),
    "the authority form": (get(line=b"GET x:80 HTTP/1.1"), 400),
    "another scheme": (get(line=b"GET ftp://x/health HTTP/1.1"), 400),
    "a fragment": (get(line=b"GET /health#x HTTP/1.1"), 400),
    "a method in small letters": (get(line=b"get /health HTTP/1.1"), 400),
    "a tab in the first line": (get(line=b"GET\t/health HTTP/1.1"), 400),
    "a space behind the first line": (get(line=b"GET /health HTTP/1.1 "), 400),
    "a chunk's size with a sign": (post(CHUNKED, b"-1\r\n" + BODY), 400),
    "a chunk's size in C": (post(CHUNKED, b"0x" + CHUNKS), 400),
    "a chunk's size without end": (post(CHUNKED, b"f" * 30 + b"\r\n"), 400),
    "a chunk's size with a space": (post(CHUNKED, CHUNKS.replace(b"\r\n", b" \r\n", 1)), 400),
    "chunks with bare line feeds": (post(CHUNKED, CHUNKS.replace(b"\r\n", b"\n")), 400),
    "an extension that ends in a line feed": (post(CHUNKED, CHUNKS.replace(b"\r\n", b";a\n", 1)), 400),
    "a chunk that is longer than it says": (post(CHUNKED, b"3\r\n" + BODY + b"\r\n0\r\n\r\n"), 400),
    "a length among the trailers": (post(CHUNKED, CHUNKS[:-2] + b"Content-Length: 3\r\n\r\n"), 400),
    "an upgrade with a body": (post(LENGTH + b"Connection: Upgrade\r\nUpgrade: h2c\r\n", BODY), 501),
    "an odd expectation": (post(LENGTH + b"Expect: 200-ok\r\n", BODY), 417),
    "many headers": (get(b"Host: x\r\n" + b"a: b\r\n" * MAX_FIELDS), 431),
    "many trailers": (post(CHUNKED, CHUNKS[:-2] + b"a: b\r\n" * (MAX_FIELDS + 2)), 431),
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
    await client.send(TAKEN[case])
    status, body = await client.answer()
    assert status == 200
    assert not body or json.loads(body).get("count", 2) == 2  # health counts nothing


@pytest.mark.parametrize("case", REFUSED)
async def test_what_has_two_readings_is_refused(client: RawClient, case: str) -> None:
    """The refusal is JSON, and the connection ends, so that no smuggled request is read."""
    raw, expected = REFUSED[case]
    await client.send(raw + get(line=b"GET /version HTTP/1.1"))
    status, body = await client.answer()
    assert status == expected
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert await client.ended() == b""


async def test_requests_may_come_before_the_answers(client: RawClient) -> None:
    """Pipelined requests are answered in order, also after an upgrade that the server ignores."""
    upgrade = get(b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n")
    await client.send(upgrade + get(line=b"GET /version HTTP/1.1") + get(line=b"GET /nope HTTP/1.1"))
    assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 404]


async def test_few_requests_wait_on_a_connection(client: RawClient) -> None:
    """The server closes a connection that sends hundreds of requests without reading."""
    await client.send(get() * (2 * MAX_PIPELINED))
    assert (await client.ended()).count(b"HTTP/1.1") <= MAX_PIPELINED


async def test_a_trailer_is_no_header(client: RawClient) -> None:
    """A field behind the body does not become part of the head, such as the request's id."""
    await client.send(post(CHUNKED, CHUNKS[:-2] + b"X-Request-Id: mine\r\n\r\n"))
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"mine" not in head


@pytest_asyncio.fixture
async def web(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API that cannot generate."""
    transport = httpx.ASGITransport(create_app(silent_service(tmp_path)))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("page_size=0", "page_size"),
        ("page_size=ten", "page_size"),
        ("page_sise=5", "page_sise"),
        ("page_size=1&page_size=2", "page_size"),
    ],
)
async def test_a_query_is_read_as_strictly_as_a_body(web: httpx.AsyncClient, query: str, param: str) -> None:
    """An unknown name, a wrong value and a name that comes twice are refused by name."""
    answer = await web.get(f"/v1/adapters?{query}")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith("the query of the request is not valid.")


async def test_a_prompt_is_not_rendered(web: httpx.AsyncClient) -> None:
    """Options of rendering messages are refused beside a text, rather than ignored."""
    answer = await web.post("/tokenize", json={"prompt": "Hi", "add_generation_prompt": True})
    assert answer.status_code == 400
    assert "only with messages" in answer.json()["error"]["message"]
