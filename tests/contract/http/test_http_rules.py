"""The rules of HTTP that hold in every API: heads over a raw socket, routes, and bodies."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from inference_service.api.http.app import ENDPOINTS, create_app
from inference_service.api.http.openai.schema import MAX_PROMPTS
from inference_service.api.http.server import HttpServer
from inference_service.api.http.wire.protocol import MAX_FIELDS, MAX_PIPELINED, MAX_TARGET_BYTES
from inference_service.api.requests.service import GenerationService
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from tests.support.cases import cases
from tests.support.openai_api import OpenAIApi
from tests.support.raw_http import RawClient
from tests.support.services.silent import silent_service
from tests.support.waiting import BOUND_S
from tests.support.web import web_client

pytestmark = pytest.mark.asyncio(loop_scope="module")


def get(fields: bytes = b"Host: localhost\r\n", path: bytes = b"/health") -> bytes:
    """A request without a body."""
    return b"GET " + path + b" HTTP/1.1\r\n" + fields + b"\r\n"


def request_of(text: str) -> bytes:
    """Return the bytes of a row of the table, with the parts that it names."""
    for name, part in cases(__file__, "parts").items():
        text = text.replace(name, part)
    return text.encode("latin-1")


TAKEN = {name: request_of(text) for name, text in cases(__file__, "taken").items()}


def post(trailers: bytes) -> bytes:
    """A request with a body in chunks, and fields behind it."""
    return TAKEN["chunks"][:-2] + trailers + b"\r\n"


REFUSED = {
    **{name: (request_of(text), status) for name, (status, text) in cases(__file__, "refused").items()},
    "long target": (get(path=b"/" + b"a" * MAX_TARGET_BYTES), 431),
    "many headers": (get(b"Host: localhost\r\n" + b"a: b\r\n" * MAX_FIELDS), 431),
    "many trailers": (post(b"a: b\r\n" * (MAX_FIELDS + 2)), 431),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> GenerationService:
    """A service that tokenizes and does not generate."""
    return silent_service(tmp_path_factory.mktemp("text"))


@pytest_asyncio.fixture(loop_scope="module")
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
    await client.send(post(b"X-Request-Id: mine\r\n"))
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"mine" not in head


CHAT, PLAIN, MESSAGES, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/embeddings"
BODIES = {each.path: each.body for each in ENDPOINTS if each.body}
USUAL: dict[str, dict[str, Any]] = cases(__file__, "usual bodies")
"""A body of each route, to which a row adds what is wrong."""
REFUSED_BODIES: dict[str, list[Any]] = cases(__file__, "refused bodies")
"""Rows of each route: wrong fields, the place that the error names, and the error's code in OpenAI's form."""
DEEP_GRAMMAR = "root ::= " + "(" * 3000 + '"a"' + ")" * 3000
LARGE_BODIES: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, None, "context_length_exceeded"),
    (PLAIN, {"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt", "invalid_value"),
    (PLAIN, {"prompt": ["A"] * 200, "n": 6}, "n", "invalid_value"),
    (PLAIN, {"structured_outputs": {"choice": ["x"] * 1025}}, "structured_outputs.choice", "invalid_value"),
    (
        PLAIN,
        {"structured_outputs": {"grammar": f"root ::= {'(' * 3000}'a'{')' * 3000}"}},
        "structured_outputs",
        "invalid_schema",
    ),
    (VECTORS, {"input": [7] * 257}, None, "context_length_exceeded"),
    (VECTORS, {"input": [[5]] * 2049}, "input", "invalid_value"),
]
"""Such rows whose fields are long."""
for path, *row in LARGE_BODIES:
    REFUSED_BODIES[path].append(row)


@pytest_asyncio.fixture(loop_scope="module")
async def web(api: OpenAIApi) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API in front of a tiny model, without a socket."""
    async with web_client(create_app(api.ready.service)) as client:
        yield client


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error of a refusal, which is JSON in the form of the route's API."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    if answer.request.url.path.startswith(MESSAGES):
        assert (list(body), body["type"]) == (["type", "error", "request_id"], "error")
        assert body["request_id"] == answer.headers["request-id"]
        return {"param": None, "code": None} | body["error"]
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return dict(body["error"])


@pytest.mark.parametrize("path", REFUSED_BODIES)
async def test_what_is_wrong_in_a_body_is_named(web: httpx.AsyncClient, path: str) -> None:
    """A wrong field is 400 with the name that the client wrote, once, whether a stream was asked for or not."""
    kind = BODIES[path]
    streams = ({}, {"stream": True}) if "stream" in kind.model_fields else ({},)
    for fields, param, *code in REFUSED_BODIES[path]:
        for stream in streams:
            answer = await web.post(path, json={"model": "base"} | USUAL[path] | fields | stream)
            error = error_of(answer)
            found = (answer.status_code, error["type"], error["param"], error["code"])
            place = (param, *code) if code else (None, None)
            assert found == (400, "invalid_request_error", *place), (fields, error)
            assert not param or error["message"].count(f"{param}: ") == 1, (fields, error)


@pytest.mark.parametrize(
    ("text", "param", "found"), [*cases(__file__, "refused texts"), ("[" * 1000, None, "not JSON")]
)
async def test_a_text_that_is_no_body_is_refused(
    web: httpx.AsyncClient, text: str, param: str | None, found: str
) -> None:
    """No JSON and no object have no parameter; the message has every finding, the parameter is the first's."""
    answer = await web.post(CHAT, content=text, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param)
    assert found in error["message"]


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
    answer = await web.post(PLAIN, json={"model": "m", "prompt": "p", "priority": value})
    assert error_of(answer)["message"].endswith(f", found {found}")


@pytest.mark.parametrize(("query", "param", "problem"), cases(__file__, "queries"))
async def test_a_query_is_read_as_strictly_as_a_body(
    web: httpx.AsyncClient, query: str, param: str, problem: str
) -> None:
    """An unknown name, a wrong value and a name that comes twice are refused by name."""
    answer = await web.get(f"/v1/adapters?{query}")
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"] == f"the query of the request is not valid. {param}: {problem}"


@pytest.mark.parametrize(
    ("method", "path", "status", "found"),
    [
        ("GET", "/page/", 404, "is not served"),
        ("GET", "/page/../app.py", 404, "is not served"),
        ("POST", "/completions", 404, "is not served, but /v1/completions "),
        ("GET", CHAT, 405, "is not served, but POST "),
        ("GET", MESSAGES, 405, "is not served, but POST "),
        ("DELETE", "/v1/models/rs", 405, "is not served, but "),
    ],
)
async def test_a_route_that_is_not_served_is_refused(
    web: httpx.AsyncClient, method: str, path: str, status: int, found: str
) -> None:
    """Unknown routes and wrong methods are errors like all others, and name what is served."""
    answer = await web.request(method, path)
    error = error_of(answer)
    assert answer.status_code == status
    assert error["code"] == (
        None if path == MESSAGES else {404: "unknown_url", 405: "method_not_allowed"}[status]
    )
    assert found in error["message"]


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_body_must_say_that_it_is_json(web: httpx.AsyncClient, path: str) -> None:
    """A form, which a page of another origin could send, is refused."""
    sent = json.dumps({"model": "base", "max_tokens": 1} | USUAL[path])
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        answer = await web.post(path, content=sent, headers=headers)
        assert answer.status_code == 415
        assert error_of(answer)["code"] == (None if path == MESSAGES else "unsupported_media_type")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await web.post(path, content=sent, headers=headers)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_bodies_are_bounded(api: OpenAIApi, path: str) -> None:
    """A body that is too large is refused, whether it says so beforehand or not."""
    headers = {"content-type": "application/json"}

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(MAX_REQUEST_BYTES // 2**20 + 1):
            yield b" " * 2**20

    for content in (b" " * (MAX_REQUEST_BYTES + 1), parts()):
        answer = await api.http.post(path, content=content, headers=headers)
        error = error_of(answer)
        assert answer.status_code == 413
        assert "request_too_large" in (error["type"], error["code"])
