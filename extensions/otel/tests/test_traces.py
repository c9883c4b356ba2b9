"""Traces and log lines of requests through both APIs, with a tiny model."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from structlog.contextvars import merge_contextvars

from inference_service.api.http.server import HttpServer
from inference_service.api.requests.service import GenerationService
from inference_service.api.rpc.servicer import SERVICE_NAME, InferenceServicer
from inference_service.driver.telemetry.request_log import open_watchers
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc
from loramux_otel.tracing import Tracing
from loramux_shared.rpc.server import RpcServer
from tests.support.services.operated_replicas import Built
from tests.support.waiting import BOUND_S, until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
FIELDS: dict[str, Any] = {"model": "rs", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


class Watched:
    """A server with both APIs, and its spans and log lines."""

    def __init__(self, http: str, rpc: str, exporter: InMemorySpanExporter) -> None:
        self.web = httpx.AsyncClient(base_url=f"http://{http}", timeout=BOUND_S)
        self.rpc = rpc
        self._exporter = exporter

    def all_spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    async def spans(self, api: str) -> dict[str, ReadableSpan]:
        """Return a request's spans by name once the server's has ended, which may be after the client's."""

        def names() -> list[str]:
            return [span.name for span in self.all_spans()]

        await until(lambda: api in names(), f"the span {api}", names)
        spans = {span.name: span for span in self.all_spans()}
        assert len(spans) == len(names())
        self._exporter.clear()
        return spans

    async def generate(self, **metadata: str) -> list[pb.GenerateResponse]:
        sampling = pb.SamplingParams(max_tokens=4, ignore_eos=True)
        request = pb.GenerateRequest(model="rs", text="Hi", sampling=sampling)
        async with grpc.aio.insecure_channel(self.rpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return [message async for message in stub.Generate(request, metadata=list(metadata.items()))]


@pytest_asyncio.fixture(params=[False], ids=["no texts"])
async def watched(request: pytest.FixtureRequest, chatty: Built) -> AsyncIterator[Watched]:
    """A server that traces into memory; the parameter says whether it logs texts."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = Tracing(provider)
    ready = chatty[0].load(chatty[1], stream_interval_ms=0)
    made, watchers = ready.service, open_watchers(tracing, log_prompts=request.param)
    service = GenerationService(made.local, made.text, made.limits, made.metrics, watchers)
    http = HttpServer("127.0.0.1:0", service, tracing=tracing)
    add = InferenceServicer(service).register
    rpc = RpcServer("127.0.0.1:0", {SERVICE_NAME: add}, tracing=tracing)
    server = Watched(await http.start(), await rpc.start(), exporter)
    ready.engine.start()
    yield server
    await server.web.aclose()
    await http.drain(5)
    await rpc.drain(5)
    await ready.engine.stop()


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs([merge_contextvars]) as lines:
        yield lines


def check_chain(spans: dict[str, ReadableSpan], api: str, request: str) -> None:
    """Check that the server's span is below the client's, then the request's, then its stages in order."""
    assert set(spans) == {api, request, "queue", "prefill", "decode"}
    assert {span.context.trace_id for span in spans.values()} == {int(TRACE, 16)}
    parents = {name: span.parent.span_id for name, span in spans.items() if span.parent}
    assert parents[api] == int(SPAN, 16)
    assert parents[request] == spans[api].context.span_id
    assert {parents[name] for name in ("queue", "prefill", "decode")} == {spans[request].context.span_id}
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    whole = spans[request]
    ends = [queue.end_time, prefill.end_time, decode.end_time, whole.end_time]
    edges = [whole.start_time, queue.start_time, *ends]
    assert edges == sorted(edges, key=int)
    assert (prefill.start_time, decode.start_time) == (queue.end_time, prefill.end_time)


async def test_a_request_over_http_is_traced(watched: Watched) -> None:
    """An incoming traceparent is honoured up to the last token, with the conventions' attributes."""
    answer = await watched.web.post("/v1/completions", json=FIELDS, headers={"traceparent": TRACEPARENT})
    assert answer.status_code == 200
    spans = await watched.spans("POST /v1/completions")
    check_chain(spans, "POST /v1/completions", "text_completion rs")
    assert spans["POST /v1/completions"].attributes == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "http.response.status_code": 200,
    }
    attributes = dict(spans["text_completion rs"].attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert len(attributes.pop("loramux.adapter.digest")) == 12
    assert len(attributes.pop("gen_ai.response.id")) == 32
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "loramux",
        "gen_ai.request.model": "rs",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }


async def test_a_stream_is_traced_to_its_end(watched: Watched) -> None:
    """The server's span of a stream ends after the last event, not with the headers."""
    body = {"model": "all", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}
    answer = await watched.web.post("/v1/chat/completions", json=body, headers={"traceparent": TRACEPARENT})
    assert answer.text.endswith("[DONE]\n\n")
    spans = await watched.spans("POST /v1/chat/completions")
    check_chain(spans, "POST /v1/chat/completions", "chat all")
    api, decode = spans["POST /v1/chat/completions"], spans["decode"]
    assert (api.end_time or 0) > (decode.end_time or 0)


async def test_a_request_over_grpc_is_traced(watched: Watched) -> None:
    """The same over gRPC, whose metadata carries the traceparent."""
    await watched.generate(traceparent=TRACEPARENT)
    api = f"{SERVICE_NAME}/Generate"
    spans = await watched.spans(api)
    check_chain(spans, api, "text_completion rs")
    assert spans[api].attributes == {
        "rpc.system": "grpc",
        "rpc.service": SERVICE_NAME,
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
    }


async def test_what_fails_says_why(watched: Watched) -> None:
    """The span of a refused request is an error with the fault's reason, and has no stages."""
    answer = await watched.web.post("/v1/completions", json=FIELDS | {"temperature": -1})
    assert answer.status_code == 400
    spans = await watched.spans("POST /v1/completions")
    assert set(spans) == {"POST /v1/completions", "text_completion rs"}
    refused = spans["text_completion rs"]
    assert refused.status.status_code is StatusCode.ERROR
    assert (refused.attributes or {})["error.type"] == "REQUEST_INVALID"


async def test_a_client_that_goes_away(watched: Watched, lines: list[Any]) -> None:
    """Spans of a cancelled call end as CANCELLED, over both APIs, and nothing is logged about contexts."""
    sampling = pb.SamplingParams(max_tokens=200, ignore_eos=True)
    async with grpc.aio.insecure_channel(watched.rpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(pb.GenerateRequest(model="all", text="Hi", sampling=sampling))
        await call.read()
        await call.read()
        call.cancel()
        spans = await watched.spans(f"{SERVICE_NAME}/Generate")
    body = FIELDS | {"max_tokens": 200, "stream": True}
    async with watched.web.stream("POST", "/v1/completions", json=body) as stream:
        await anext(stream.aiter_lines())
    spans |= await watched.spans("POST /v1/completions")
    for name in (f"{SERVICE_NAME}/Generate", "text_completion all", "text_completion rs"):
        assert (spans[name].attributes or {})["error.type"] == "CANCELLED", name
    assert [line["outcome"] for line in lines if line["event"] == "request ended"] == ["CANCELLED"] * 2
    assert not [line for line in lines if line["log_level"] != "info"]


async def test_what_monitors_ask_is_not_traced(watched: Watched) -> None:
    """Health, metrics and unknown paths make no spans."""
    for path in ("/health", "/ping", "/load", "/metrics", "/nope"):
        await watched.web.get(path)
    await watched.web.post("/ping")
    await watched.web.post("/v1/completions", json=FIELDS)
    spans = await watched.spans("POST /v1/completions")
    assert set(spans) == {"POST /v1/completions", "text_completion rs", "queue", "prefill", "decode"}


async def test_every_request_has_one_line(watched: Watched, lines: list[Any]) -> None:
    """The line names request, trace, model, digest, tokens, times and end, and no line holds text."""
    headers = {"x-request-id": "from-me", "traceparent": TRACEPARENT}
    answer = await watched.web.post("/v1/completions", json=FIELDS | {"n": 2}, headers=headers)
    [line] = lines
    assert answer.json()["id"] == f"cmpl-{line['id']}"
    assert 0 <= line.pop("queue_ms") <= line.pop("ttft_ms") <= line.pop("duration_ms")
    assert len(line.pop("digest")) == 12
    assert line == {
        "event": "request ended",
        "log_level": "info",
        "request_id": "from-me",
        "trace_id": TRACE,
        "id": line["id"],
        "model": "rs",
        "outcome": "OK",
        "finish": ["length", "length"],
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 8,
    }


@pytest.mark.parametrize("watched", [True], indirect=True)
async def test_texts_are_logged_where_that_is_asked(watched: Watched, lines: list[Any]) -> None:
    """The line has the prompt and every answer with LORAMUX_LOG_PROMPTS."""
    body = {"model": "rs", "messages": [{"role": "user", "content": "Secret"}], "max_tokens": 4, "n": 2}
    answer = (await watched.web.post("/v1/chat/completions", json=body)).json()
    [line] = lines
    assert line["prompt"] == [{"role": "user", "content": "Secret"}]
    assert line["answers"] == [choice["message"]["content"] for choice in answer["choices"]]
    json.dumps(line)
