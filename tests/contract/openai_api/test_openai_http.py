"""The OpenAI door as HTTP: routes, errors, limits, clients that go away, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from inference_service.openai_api.app import ENDPOINTS
from inference_service.openai_api.server import HttpServer
from inference_service.serving.text import Text
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rpc.options import MAX_REQUEST_BYTES
from loramux_shared.storage.memory import MemoryStore
from tests.golden.openai.script import ASKED, Case, Scripted
from tests.support.openai_door import OpenAIDoor, open_door, openai_world
from tests.support.tiny import VOCAB, World, write_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI: dict[str, Any] = {"model": "rs", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
LONG: dict[str, Any] = {"model": "all", "prompt": [5, 6, 7], "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    return openai_world(tmp_path_factory.mktemp("openai"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(world: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIDoor]:
    async with open_door(world) as door:
        yield door


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return dict(body["error"])


async def test_models_are_listed_with_what_is_known_of_them(door: OpenAIDoor) -> None:
    """The base first; an adapter names its base, its source, its digest, its ranks and its modules."""
    listed = (await door.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    base, *adapters = listed["data"]
    assert (base["id"], base["parent"], base["digest"]) == ("base", None, None)
    assert [model["id"] for model in adapters] == ["all", "rs", "wide"]
    everything = adapters[0]
    assert everything["parent"] == "base"
    assert everything["digest"] == door.ready.service.catalog.get("all").digest
    assert everything["ranks"] == [2, 4, 12]
    assert adapters[2]["modules"] == ["attn_q", "attn_v"]
    assert (everything["kinds"], base["kinds"]) == (["lora"], [])
    assert (everything["replaced_rows"], everything["invocation_tokens"]) == ({}, [])
    assert (base["tool_parser"], base["reasoning_parser"]) == ("auto", "auto")
    assert (everything["licence"], base["licence"], everything["base_licence"]) == (None, None, None)
    assert everything["root"].startswith("all@")
    assert "/" not in everything["root"]
    assert all(model["object"] == "model" and model["max_model_len"] == 256 for model in listed["data"])


@pytest.mark.parametrize("name", ["nope", "nope:v1.2", "org/nope", "rs/", "r%2Fs", "%ED%A0%80", "%00"])
async def test_one_model_is_described_or_not_found(door: OpenAIDoor, name: str) -> None:
    """Names may hold colons, dots and slashes; one that is not served is 404 and lists those that are."""
    assert (await door.http.get("/v1/models/rs")).json()["id"] == "rs"
    response = await door.http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    error = _error(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "base, all, rs, wide" in error["message"]


async def test_a_model_that_is_nearly_right_is_corrected(door: OpenAIDoor) -> None:
    """An unknown model is never answered by the base."""
    response = await door.post(CHAT, **HI | {"model": "wid"})
    assert response.status_code == 404
    assert "Did you mean wide?" in _error(response)["message"]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 129}, 400, "n", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": 300}, 400, None, "context_length_exceeded"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "invalid_value"),
        ({"stop": ["x"] * 17}, 400, "stop", "invalid_value"),
        ({"logit_bias": {"199": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ({"tool_choice": "required"}, 400, "tool_choice", "invalid_value"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_value"),
        ({"max_completion_tokens": 0, "stream": True}, 400, "max_completion_tokens", "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, None, "context_length_exceeded"),
        ({"stream": True, "n": 0}, 400, "n", "invalid_value"),
    ],
)
async def test_bounds_are_told_before_anything_is_sent(
    door: OpenAIDoor, fields: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    """Fields out of bounds get a status of their own, in a stream too."""
    response = await door.post(CHAT, **HI | fields)
    assert response.status_code == status
    error = _error(response)
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5, 199]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": ["A"] * 200, "n": 6}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_bounds_of_plain_prompts(door: OpenAIDoor, fields: dict[str, Any], param: str | None) -> None:
    """Fields are named as the client wrote them."""
    response = await door.post(COMPLETIONS, **{"model": "base", "prompt": "HI"} | fields)
    assert response.status_code == 400
    assert _error(response)["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/page/", 404, "unknown_url"),
        ("GET", "/page/../app.py", 404, "unknown_url"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/v1/completions/", 404, "unknown_url"),
        ("POST", "/v1/files", 404, "unknown_url"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/rs", 405, "method_not_allowed"),
    ],
)
async def test_what_is_not_served_is_refused_in_openais_shape(
    door: OpenAIDoor, method: str, path: str, status: int, code: str
) -> None:
    """Unknown routes and wrong methods are errors like all others."""
    response = await door.http.request(method, path)
    assert response.status_code == status
    assert _error(response)["code"] == code
    if status == 405:
        assert f"is not served, but {response.headers['allow']} " in _error(response)["message"]


async def test_every_endpoint_of_the_table_is_served(door: OpenAIDoor) -> None:
    """The table is what a guard can rely on: each of its routes answers, and not as unknown."""
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{model:path}", "rs").replace("{name:path}", "rs")
        response = await door.http.request(endpoint.method, path)
        assert response.status_code not in (404, 405, 500), endpoint


async def test_a_body_must_say_that_it_is_json(door: OpenAIDoor) -> None:
    """A form, which a page of another origin could send, is refused."""
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        response = await door.http.post(CHAT, content=json.dumps(HI), headers=headers)
        assert response.status_code == 415
        assert _error(response)["code"] == "unsupported_media_type"
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    sent = json.dumps(HI | {"max_tokens": 1})
    assert (await door.http.post(CHAT, content=sent, headers=headers)).status_code == 200


async def test_a_body_that_is_no_json_is_refused(door: OpenAIDoor) -> None:
    """The parser's complaint is told, and nothing of the server."""
    headers = {"content-type": "application/json"}
    response = await door.http.post(CHAT, content=b'{"model": ', headers=headers)
    assert response.status_code == 400
    assert "no JSON" in _error(response)["message"]
    response = await door.http.post(CHAT, content=b"\xff\xfe", headers=headers)
    assert response.status_code == 400


async def test_bodies_are_bounded(door: OpenAIDoor) -> None:
    """A body that is too large is refused, whether it says so beforehand or not."""
    headers = {"content-type": "application/json"}

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(MAX_REQUEST_BYTES // 2**20 + 1):
            yield b" " * 2**20

    for content in (b" " * (MAX_REQUEST_BYTES + 1), parts()):
        response = await door.http.post(CHAT, content=content, headers=headers)
        assert response.status_code == 413
        assert _error(response)["code"] == "request_too_large"


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {}), (COMPLETIONS, {"prompt": ["AB", "CDE"]})])
async def test_the_usage_so_far_comes_with_every_chunk(
    door: OpenAIDoor, path: str, prompt: dict[str, Any]
) -> None:
    """A chunk tells what its own choice has used; the last ones add up to the usage of the whole request."""
    asked = {"n": 2, "max_tokens": 6, "ignore_eos": True, "temperature": 1, "seed": 3}
    asked |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = (HI | asked) if path == CHAT else ({"model": "rs"} | prompt | asked)
    *chunks, end = await door.chunks(path, **body)
    told: dict[int, list[dict[str, int]]] = {}
    for chunk in chunks:
        told.setdefault(chunk["choices"][0]["index"], []).append(chunk["usage"])
    for usages in told.values():
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[-1] == 6
        assert len({usage["prompt_tokens"] for usage in usages}) == 1
    assert sum(usages[-1]["completion_tokens"] for usages in told.values()) == end["usage"]["completion_tokens"]
    prompts = [told[index][-1]["prompt_tokens"] for index in range(0, len(told), 2)]
    assert sum(prompts) == end["usage"]["prompt_tokens"]


async def test_requests_have_ids(door: OpenAIDoor) -> None:
    """A sane id comes back, any other is replaced, and errors have ids too."""
    for path in ("/health", "/nope"):
        response = await door.http.get(path, headers={"x-request-id": "my-id:1.2"})
        assert response.headers["x-request-id"] == "my-id:1.2"
        for given in ("", "a b", "x" * 129, "<script>"):
            response = await door.http.get(path, headers={"x-request-id": given})
            assert len(response.headers["x-request-id"]) == 32
    two = await asyncio.gather(
        *(door.http.post(CHAT, json=HI | {"max_tokens": 9}, headers={"x-request-id": "same"}) for _ in range(2))
    )
    assert [response.status_code for response in two] == [200, 200]
    assert two[0].json()["id"] != two[1].json()["id"]


async def test_a_failure_of_the_door_itself_tells_nothing(tmp_path: Path) -> None:
    """Before anything was sent it is a 500 in OpenAI's shape; in a stream the connection is cut."""
    write_tokenizer(tmp_path)
    text = Text(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), None, VOCAB)
    body = ASKED | {"messages": [{"role": "user", "content": "x"}]}
    for answers, stream in ((["A"], False), (["A|B"], True)):
        server = HttpServer(
            "127.0.0.1:0", Scripted(Case("chat", body, answers, failure=ValueError("secret")), text)
        )
        url = f"http://{await server.start()}{CHAT}"
        async with httpx.AsyncClient() as client:
            if stream:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.post(url, json=body | {"stream": True})
            else:
                response = await client.post(url, json=body)
                assert response.status_code == 500
                assert _error(response)["code"] == "internal"
                assert "secret" not in response.text
        assert await server.drain(1)


async def test_health_and_version(door: OpenAIDoor) -> None:
    """Monitors get what vLLM gives them."""
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        response = await door.http.request(method, path)
        assert (response.status_code, response.content) == (200, b"")
    assert list((await door.http.get("/version")).json()) == ["version"]
    assert "server" not in response.headers


async def test_text_becomes_tokens_and_back(door: OpenAIDoor) -> None:
    """A prompt, messages as the template renders them, and tokens."""
    tokenized = (await door.post("/tokenize", model="base", prompt="HELLO", return_token_strs=True)).json()
    assert (tokenized["count"], tokenized["max_model_len"]) == (5, 256)
    assert tokenized["token_strs"] == list("HELLO")
    told = (await door.post("/detokenize", model="base", tokens=tokenized["tokens"])).json()
    assert told == {"prompt": "HELLO"}
    rendered = (await door.post("/tokenize", **{key: HI[key] for key in ("model", "messages")})).json()
    assert rendered["token_strs"] is None
    assert (await door.post("/detokenize", tokens=rendered["tokens"])).json() == {"prompt": "u:Hi;a:"}
    assert (await door.post("/detokenize", tokens=[500])).status_code == 400
    assert (await door.post("/tokenize", model="nope", prompt="A")).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_sequences(door: OpenAIDoor, stream: bool) -> None:
    """The engine is idle again, whether the answer was streamed or awaited as a whole."""
    reader, writer = await asyncio.open_connection(*door.server.address.split(":"))
    body = json.dumps(LONG | {"stream": stream, "prompt": [[5, 6, 7]] * 4}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    if stream:
        await reader.readuntil(b"data: ")
    for _ in range(500):
        if door.ready.engine.stats.running:
            break
        await asyncio.sleep(0.01)
    assert door.ready.engine.stats.running
    writer.transport.abort()
    await door.until_free()


async def test_a_client_that_does_not_read_holds_up_nobody(door: OpenAIDoor) -> None:
    """Megabytes wait for a client that reads nothing; the engine goes on, and others are answered."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = door.server.address.split(":")
    sock.connect((host, int(port)))
    body = json.dumps(LONG | {"stream": True, "prompt": [[5, 6, 7]] * 32, "logprobs": 20}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    for _ in range(500):
        if door.ready.engine.stats.running:
            break
        await asyncio.sleep(0.01)
    assert (await door.post(CHAT, **HI | {"max_tokens": 20})).status_code == 200
    await door.until_free()
    sock.close()


async def test_heads_are_bounded(door: OpenAIDoor) -> None:
    """A head without end, in one header or in many, ends the connection; keep-alive adds nothing up."""
    for piece in (b"a" * 8192, b"x: " + b"a" * 8192 + b"\r\n"):
        reader, writer = await asyncio.open_connection(*door.server.address.split(":"))
        writer.write(b"GET /health HTTP/1.1\r\nx-big: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                writer.write(piece)
                await writer.drain()
            assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
        writer.close()
    for _ in range(20):
        assert (await door.http.get("/health", headers={"x-big": "a" * 8192})).status_code == 200


async def test_the_load_is_what_is_in_work(door: OpenAIDoor) -> None:
    """A request counts from its arrival to its end, however it ends, and each of its prompts."""
    asking = asyncio.create_task(door.post(COMPLETIONS, **LONG | {"prompt": [[5, 6, 7], [8, 9]]}))
    while not door.ready.engine.stats.running:
        await asyncio.sleep(0)
    assert (await door.http.get("/load")).json() == {"server_load": 2}
    assert (await asking).status_code == 200
    await door.post(COMPLETIONS, **LONG | {"n": 0})
    assert (await door.http.get("/load")).json() == {"server_load": 0}


async def test_a_full_queue_is_said_with_a_delay(world: tuple[World, MemoryStore]) -> None:
    """Beyond the bound a request is 429 at once, and says when to try again."""
    async with open_door(world, max_batch_seqs=1, max_queue=1) as door:
        answers = await asyncio.gather(
            *(door.post(COMPLETIONS, **LONG | {"max_tokens": 100}) for _ in range(4))
        )
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert len(refused) < 4
        for answer in refused:
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert (_error(answer)["type"], _error(answer)["code"]) == ("rate_limit_error", "queue_full")
        await door.until_free()


async def test_a_failing_step_is_an_error_without_a_word_of_why(world: tuple[World, MemoryStore]) -> None:
    """Before the first token it is a 500, later it is the last event of the stream; the next request works."""
    async with open_door(world) as door:
        runner = door.ready.engine._engine._runner
        submit, calls = runner.submit, []

        def broken(batch: object) -> object:
            calls.append(batch)
            if len(calls) in (1, 10):  # four are those that find out whether the engine still works
                raise RuntimeError("secret detail")
            return submit(batch)  # type: ignore[arg-type]

        runner.submit = broken  # type: ignore[method-assign, assignment]
        response = await door.post(COMPLETIONS, **LONG | {"stream": True})
        assert response.status_code == 500
        assert _error(response)["type"] == "server_error"
        *chunks, last = await door.events(COMPLETIONS, **LONG)
        assert chunks
        assert json.loads(last)["error"]["code"] == "internal"
        assert "secret" not in response.text + last
        assert (await door.post(COMPLETIONS, **LONG | {"max_tokens": 2})).status_code == 200
        await door.until_free()


async def test_a_replica_that_fails_says_so_and_takes_no_more(world: tuple[World, MemoryStore]) -> None:
    """A stream ends with the reason, and health and new requests are 503, to be sent elsewhere."""
    async with open_door(world) as door:
        engine, runner = door.ready.engine, door.ready.engine._engine._runner
        submit, calls = runner.submit, []

        async def on_failure() -> None:
            assert (await door.http.get("/health")).status_code == 200
            await door.server.refuse()

        def gone(batch: object) -> object:
            calls.append(batch)
            if len(calls) > 5:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return submit(batch)  # type: ignore[arg-type]

        engine._before_cut = on_failure
        runner.submit = gone  # type: ignore[method-assign, assignment]
        *chunks, last = await door.events(COMPLETIONS, **LONG)
        assert chunks
        assert json.loads(last)["error"]["code"] == "replica_failed"
        assert "CUDA" not in last
        for path in ("/health", "/ping", "/v1/models"):
            response = await door.http.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")


async def test_draining_finishes_open_streams_and_refuses_new_requests(
    world: tuple[World, MemoryStore],
) -> None:
    """After the signal, what runs is finished, what comes is 503 in OpenAI's shape, health too."""
    async with (
        open_door(world) as door,
        door.http.stream("POST", COMPLETIONS, json=LONG | {"stream": True}) as open_,
    ):
        lines = open_.aiter_lines()
        await anext(lines)
        draining = asyncio.create_task(door.server.drain(20))
        await asyncio.sleep(0)
        refused = await door.post(CHAT, **HI), await door.http.get("/health"), await door.http.post("/ping")
        for response in refused:
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert _error(response)["code"] == "shutting_down"
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert await draining
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(f"{door.url}/health")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_drain_that_takes_too_long_cuts_what_is_open(
    world: tuple[World, MemoryStore], stream: bool
) -> None:
    """When the time is over, what is open is told so, in an event or by a status, and its sequences freed."""
    async with open_door(world) as door:
        body = LONG | {"stream": stream, "n": 8}
        asking = asyncio.create_task(door.http.post(COMPLETIONS, json=body))
        while not door.ready.engine.stats.running:
            await asyncio.sleep(0)
        assert not await door.server.drain(0, door.ready.engine.cut)
        answer = await asking
        if stream:
            *_, last = [line for line in answer.text.splitlines() if line]
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            error = _error(answer)
        assert error["code"] == "shutting_down"
        await door.until_free()


async def test_an_address_that_is_taken_is_said(door: OpenAIDoor) -> None:
    """A second server on the same port does not start, nor one on no address."""
    for address in (door.server.address, "127.0.0.1:http", "unix:/tmp/x", "no.such.host.invalid:0"):
        with pytest.raises(SettingsInvalid, match=r"cannot listen on .*: expected a free HOST:PORT"):
            await HttpServer(address, door.ready.service).start()
