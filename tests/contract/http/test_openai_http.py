"""OpenAI's API as HTTP: routes, errors, limits, clients that go away, and the drain."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from inference_service.adapters.fixed import fixed_manager
from inference_service.api.http.app import create_app
from inference_service.api.http.server import HttpServer
from inference_service.core.computing import Computing, Lack
from inference_service.core.sequence import Batch
from inference_service.engine.execution.runner import Pending
from inference_service.text.chat_template import ChatTemplate
from inference_service.text.text import Text
from loramux_shared.storage.memory import MemoryStore
from tests.golden.openai.script import CHAT_BODY, Case, Scripted
from tests.support.openai_api import OpenAIApi, open_api
from tests.support.raw_http import JSON, RawClient
from tests.support.services.silent import silent_service
from tests.support.steps import Submit, engine_around
from tests.support.tiny import VOCAB, World, write_tokenizer
from tests.support.waiting import BOUND_S, bounded, until
from tests.support.web import web_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI: dict[str, Any] = {"model": "rs", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
LONG: dict[str, Any] = {"model": "all", "prompt": [5, 6, 7], "max_tokens": 250, "ignore_eos": True}


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return dict(body["error"])


async def test_models_are_listed_with_what_is_known_of_them(api: OpenAIApi) -> None:
    """The base first; an adapter names its base, its source, its digest, its ranks and its modules."""
    listed = (await api.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    base, *adapters = listed["data"]
    assert (base["id"], base["parent"], base["digest"]) == ("base", None, None)
    assert [model["id"] for model in adapters] == ["all", "rs", "wide"]
    everything = adapters[0]
    assert everything["parent"] == "base"
    assert everything["digest"] == api.ready.service.local.catalog.get("all").digest
    assert everything["ranks"] == [2, 4, 12]
    assert adapters[2]["modules"] == ["attn_q", "attn_v"]
    assert (everything["kinds"], base["kinds"]) == (["lora"], [])
    assert (everything["replaced_rows"], everything["invocation_tokens"]) == ({}, [])
    assert (base["tool_parser"], base["reasoning_parser"]) == ("auto", "auto")
    assert (everything["licence"], base["licence"], everything["base_licence"]) == (None, None, None)
    assert everything["root"].startswith("all@")
    assert "/" not in everything["root"]
    assert all(model["object"] == "model" and model["max_model_len"] == 256 for model in listed["data"])


@pytest.mark.parametrize("name", ["nope:v1.2", "org/nope", "rs/", "r%2Fs", "%ED%A0%80", "%00"])
async def test_one_model_is_described_or_not_found(api: OpenAIApi, name: str) -> None:
    """Names may hold colons, dots and slashes; one that is not served is 404 and lists those that are."""
    assert (await api.http.get("/v1/models/rs")).json()["id"] == "rs"
    response = await api.http.get(f"/v1/models/{name}")
    assert response.status_code == 404
    error = _error(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "base, all, rs, wide" in error["message"]


async def test_each_model_has_kserves_name_too(api: OpenAIApi) -> None:
    """Base and adapters answer under either name at every route; a wrong name is not the base's."""
    usual: dict[str, Any] = {"messages": HI["messages"], "max_tokens": 2}
    for path, body in (
        (CHAT, usual),
        (COMPLETIONS, {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/messages", usual),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
    ):
        for name in ("base", "rs"):
            answer = await api.post(path, model=f"publishers/ns/models/{name}", **body)
            assert (answer.status_code, answer.headers["x-loramux-model"]) == (200, name)
    for nobody in ("ns/models/nobody", "ns/rs", "n/s/models/rs", "ns/models/"):
        refused = await api.post(CHAT, **HI | {"model": f"publishers/{nobody}"})
        assert _error(refused)["code"] == "model_not_found"


@pytest.mark.parametrize(("path", "prompt"), [(CHAT, {}), (COMPLETIONS, {"prompt": ["AB", "CDE"]})])
async def test_the_usage_so_far_comes_with_every_chunk(
    api: OpenAIApi, path: str, prompt: dict[str, Any]
) -> None:
    """A chunk has the usage of its own choice; the last chunks add up to the usage of the request."""
    requests = {"n": 2, "max_tokens": 6, "ignore_eos": True, "temperature": 1, "seed": 3}
    requests |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = (HI | requests) if path == CHAT else ({"model": "rs"} | prompt | requests)
    *chunks, end = await api.chunks(path, **body)
    reported: dict[int, list[dict[str, int]]] = {}
    for chunk in chunks:
        reported.setdefault(chunk["choices"][0]["index"], []).append(chunk["usage"])
    for usages in reported.values():
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[-1] == 6
        assert len({usage["prompt_tokens"] for usage in usages}) == 1
    assert (
        sum(usages[-1]["completion_tokens"] for usages in reported.values())
        == end["usage"]["completion_tokens"]
    )
    prompts = [reported[index][-1]["prompt_tokens"] for index in range(0, len(reported), 2)]
    assert sum(prompts) == end["usage"]["prompt_tokens"]


async def test_requests_have_ids(api: OpenAIApi) -> None:
    """A sane id comes back, any other is replaced, and errors have ids too."""
    for path in ("/health", "/nope"):
        response = await api.http.get(path, headers={"x-request-id": "my-id:1.2"})
        assert response.headers["x-request-id"] == "my-id:1.2"
        for provided in ("", "a b", "x" * 129, "<script>"):
            response = await api.http.get(path, headers={"x-request-id": provided})
            assert len(response.headers["x-request-id"]) == 32
    two = await asyncio.gather(
        *(api.http.post(CHAT, json=HI | {"max_tokens": 9}, headers={"x-request-id": "same"}) for _ in range(2))
    )
    assert [response.status_code for response in two] == [200, 200]
    assert two[0].json()["id"] != two[1].json()["id"]


async def test_a_failure_of_the_api_itself_tells_nothing(tmp_path: Path) -> None:
    """A failure before the first byte is a 500 in OpenAI's shape; a failure in a stream cuts the connection."""
    write_tokenizer(tmp_path)
    text = Text(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), ChatTemplate("??", {}), VOCAB)
    body = CHAT_BODY | {"messages": [{"role": "user", "content": "x"}]}
    for answers, stream in ((["A"], False), (["A|B"], True)):
        server = HttpServer(
            "127.0.0.1:0", Scripted(Case("chat", body, answers, failure=ValueError("secret")), text)
        )
        url = f"http://{await server.start()}{CHAT}"
        async with httpx.AsyncClient(timeout=BOUND_S) as client:
            if stream:
                with pytest.raises(httpx.RemoteProtocolError):
                    await client.post(url, json=body | {"stream": True})
            else:
                response = await client.post(url, json=body)
                assert response.status_code == 500
                assert _error(response)["code"] == "internal"
                assert "secret" not in response.text
        assert await server.drain(BOUND_S)


async def test_health_and_version(api: OpenAIApi, tmp_path: Path) -> None:
    """Monitors get the status that vLLM gives them, and why it is slow if so."""
    manager = api.ready.service.local.adapters
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        response = await api.http.request(method, path)
        expected = {"status": "ok", "backend": manager.facts.computing.backend}
        assert (response.status_code, response.json()) == (200, expected)
    slower = replace(manager.facts, computing=Computing(lack=Lack.NO_COMPILER))
    service = silent_service(tmp_path)
    service.local.adapters = fixed_manager(service.local.catalog, slower)
    async with web_client(create_app(service)) as web:
        slow = await web.get("/health")
    assert slow.status_code == 200
    assert slow.json() == {"status": "slow", "backend": "torch", "lack": "no_compiler"}
    assert list((await api.http.get("/version")).json()) == ["version"]
    assert "server" not in response.headers


def _sent(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (COMPLETIONS.encode(), JSON, len(content))
        + content
    )


async def _begun(api: OpenAIApi, before: int) -> None:
    """Wait until the engine has generated more than so many tokens."""
    engine = api.ready.engine
    await until(lambda: engine.stats.tokens_generated > before, "a sequence in work", lambda: engine.stats)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_sequences(api: OpenAIApi, stream: bool) -> None:
    """The engine is idle again, whether the answer was streamed or awaited as a whole."""
    client = await RawClient.open(api.server.address)
    before = api.ready.engine.stats.tokens_generated
    await client.send(_sent(LONG | {"stream": stream, "prompt": [[5, 6, 7]] * 4}))
    if stream:
        await client.reader.readuntil(b"data: ")
    await _begun(api, before)
    client.writer.transport.abort()
    await api.until_free()


async def test_a_client_of_http_1_0_gets_no_chunks(api: OpenAIApi) -> None:
    """A stream ends with the connection."""
    client = await RawClient.open(api.server.address)
    await client.send(_sent(LONG | {"stream": True, "max_tokens": 2}).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = (await client.ended()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


async def test_the_load_is_what_is_in_work(api: OpenAIApi) -> None:
    """The load counts each prompt of a request from its arrival to its end."""
    await api.ready.engine.pause()
    asking = asyncio.create_task(
        api.post(COMPLETIONS, **LONG | {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 9})
    )
    try:
        async with bounded("two sequences to count as load"):
            while (load := (await api.http.get("/load")).json()) != {"server_load": 2}:
                assert load["server_load"] < 2
    finally:
        api.ready.engine.resume()
    assert (await asking).status_code == 200
    await api.post(COMPLETIONS, **LONG | {"n": 0})
    assert (await api.http.get("/load")).json() == {"server_load": 0}


async def test_a_full_queue_is_reported_with_a_delay(world: tuple[World, MemoryStore]) -> None:
    """Beyond the bound a request is 429 at once, and says when to try again."""
    async with open_api(world, max_batch_seqs=1, max_queue=1) as api:
        await api.ready.engine.pause()
        asking = [asyncio.create_task(api.post(COMPLETIONS, **LONG | {"max_tokens": 9})) for _ in range(4)]
        done = await until(lambda: [each for each in asking if each.done()], "a refusal")
        api.ready.engine.resume()
        answers = await asyncio.gather(*asking)
        assert done[0].result().status_code == 429
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) < 4
        for answer in refused:
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert (_error(answer)["type"], _error(answer)["code"]) == ("rate_limit_error", "queue_full")


async def test_a_failing_step_is_an_error_without_a_word_of_why(world: tuple[World, MemoryStore]) -> None:
    """A failing step is a 500 before the first token, else the last event of a stream; the next one works."""
    failing: list[bool] = []

    def broken(submit: Submit, batch: Batch) -> Pending:
        if failing and failing.pop(0):
            raise RuntimeError("secret detail")
        return submit(batch)

    async with open_api(world, build=engine_around(broken)) as api:
        failing += [True, *[False] * 8, True]  # four are those that find out whether the engine still works
        response = await api.post(COMPLETIONS, **LONG | {"stream": True})
        assert response.status_code == 500
        assert _error(response)["type"] == "server_error"
        *chunks, last = await api.events(COMPLETIONS, **LONG)
        assert chunks
        assert json.loads(last)["error"]["code"] == "internal"
        assert "secret" not in response.text + last
        assert (await api.post(COMPLETIONS, **LONG | {"max_tokens": 2})).status_code == 200
        await api.until_free()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_drain_that_takes_too_long_cuts_what_is_open(
    world: tuple[World, MemoryStore], stream: bool
) -> None:
    """At the deadline, open requests get the reason, as an event or a status, and their sequences are freed."""
    async with open_api(world) as api:
        body = LONG | {"stream": stream, "n": 8}
        engine = api.ready.engine
        await engine.pause()
        asking = asyncio.create_task(api.http.post(COMPLETIONS, json=body))
        await until(lambda: engine.stats.waiting, "a request that waits", lambda: engine.stats)
        assert not await api.server.drain(0, engine.cut)
        engine.resume()
        answer = await asking
        if stream:
            *_, last = [line for line in answer.text.splitlines() if line]
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            error = _error(answer)
        assert error["code"] == "shutting_down"
        await api.until_free()
