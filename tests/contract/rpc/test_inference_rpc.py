"""The gRPC API over a real loopback channel, from our clients and plain stubs to a tiny model and back."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from inference_service.core.sequence import Batch
from inference_service.engine.runner import Pending
from inference_service.rpc.servicer import SERVICE_NAME
from inference_service.startup.load import Ready
from loramux import AsyncClient, Client, FinishReason, faults
from loramux.inference.v1 import inference_pb2 as pb, inference_pb2_grpc
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.status import fault_of
from loramux_shared.storage.memory import MemoryStore
from tests.support.grpc_api import open_rpc
from tests.support.service import until_free
from tests.support.tiny import World, make_world
from tests.support.waiting import BOUND_S, until

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEMPLATE = """{% for m in messages %}<{{ m.role }}{% if m.name %}/{{ m.name }}{% endif %}:
{{- m.content if m.content is not none else 'nothing' }}
{%- for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.at }}){% endfor %}
{%- if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}>{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}!{% endif %}"""
PROMPT = [5, 6, 7, 8]
TOKENS = pb.TokenIds(ids=PROMPT)
SAMPLED: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "temperature": 1.0, "seed": 3}


def greedy(max_tokens: int, **fields: Any) -> pb.SamplingParams:
    """Return the parameters for so many tokens, whatever comes."""
    return pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


class RpcApi:
    """A running server, a stub and a client."""

    def __init__(self, ready: Ready, server: RpcServer) -> None:
        self.ready = ready
        self.server = server
        self.channel = grpc.aio.insecure_channel(server.address)
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.client = AsyncClient(server.address)

    async def events(self, timeout: float | None = None, **fields: object) -> list[pb.GenerateResponse]:
        """Call Generate and collect the stream."""
        request = pb.GenerateRequest(**({"model": "base", "token_ids": TOKENS} | fields))
        return [event async for event in self.stub.Generate(request, timeout=timeout)]

    async def failure(self, **fields: object) -> tuple[grpc.StatusCode, str, list[str], str]:
        """Call Generate and return code, reason, violated fields and message."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.events(**fields)
        status = rpc_status.from_call(caught.value)
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(bad)
        fields_named = sorted({violation.field for violation in bad.field_violations})
        return caught.value.code(), info.reason, fields_named, status.message

    async def until_free(self) -> None:
        """Wait until the engine holds no sequence."""
        await until_free(self.ready)


@asynccontextmanager
async def served(ready: Ready) -> AsyncIterator[RpcApi]:
    """Put a server before a service."""
    async with open_rpc(ready.service) as server:
        api = RpcApi(ready, server)
        async with api.channel, api.client:
            yield api


@asynccontextmanager
async def opened(built: tuple[World, MemoryStore], **settings: object) -> AsyncIterator[RpcApi]:
    """Load a service, and serve it."""
    ready = built[0].load(built[1], **({"stream_interval_ms": 0} | settings))
    ready.engine.start()
    try:
        async with served(ready) as api:
            yield api
    finally:
        await ready.engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RpcApi]:
    """A server that the tests share."""
    world, store = make_world(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048), MemoryStore()
    (world.base / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    world.build(store)
    async with opened((world, store)) as api:
        yield api


@pytest_asyncio.fixture(loop_scope="module")
async def api(shared: RpcApi) -> RpcApi:
    """The same, once it holds nothing of the test before."""
    await shared.until_free()
    return shared


async def test_a_stream_is_started_deltas_finished(api: RpcApi) -> None:
    """A stream has one Started with the model, the tokens, and one Finished with the counts."""
    events = await api.events(model="rs", sampling=greedy(5))
    kinds = [event.WhichOneof("event") for event in events]
    assert [kinds[0], *sorted(set(kinds[1:-1])), kinds[-1]] == ["started", "delta", "finished"]
    assert sum(len(event.delta.token_ids) for event in events) == 5
    started, finished = events[0].started, events[-1].finished
    assert started.model == "rs"
    assert started.adapter_digest == api.ready.service.catalog.get("rs").digest
    assert (started.generation, started.prompt_tokens) == (1, 4)
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (4, 5)


async def test_tokens_between_first_and_last_come_together(
    world: tuple[World, MemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token has a message of its own, and all tokens within an interval share one."""
    async with opened(world, stream_interval_ms=3_600_000) as api:
        read, runner = threading.Event(), api.ready.engine._engine._runner
        submit = runner.submit

        def second_waits(batch: Batch) -> Pending:
            """Let the step behind the first token wait until the client has it."""
            assert batch.chunks[0].start == 0 or read.wait(BOUND_S)
            return submit(batch)

        monkeypatch.setattr(runner, "submit", second_waits)
        request = pb.GenerateRequest(model="base", token_ids=TOKENS, sampling=greedy(40))
        deltas = []
        async for event in api.stub.Generate(request):
            deltas.append(event.delta)
            if event.delta.token_ids:
                read.set()
    assert [len(delta.token_ids) for delta in deltas[1:-1]] == [1, 39]


async def test_closing_the_stream_frees_the_sequence(api: RpcApi) -> None:
    """A client that goes away costs nothing beyond the step in progress."""
    request = pb.GenerateRequest(
        model="all", token_ids=TOKENS, sampling=pb.SamplingParams(max_tokens=250, ignore_eos=True)
    )
    call = api.stub.Generate(request)
    await call.read()
    await call.read()
    call.cancel()
    await api.until_free()


async def test_a_deadline_frees_the_sequence(api: RpcApi) -> None:
    """A call whose deadline passes ends as DEADLINE_EXCEEDED, and its sequence is freed."""
    await api.ready.engine.pause()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.events(timeout=0.05, sampling=greedy(200))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    finally:
        api.ready.engine.resume()
    await api.until_free()


async def test_a_full_queue_is_reported_with_a_delay(world: tuple[World, MemoryStore]) -> None:
    """Beyond the bound a request is refused at once, with RetryInfo."""
    async with opened(world, max_batch_seqs=1, max_queue=1) as api:
        await api.ready.engine.pause()
        long = pb.GenerateRequest(model="base", token_ids=TOKENS, sampling=greedy(200))
        calls = [api.stub.Generate(long) for _ in range(4)]
        reads = [asyncio.create_task(call.read()) for call in calls]
        await until(lambda: any(read.done() for read in reads), "a refusal")
        api.ready.engine.resume()
        firsts = await asyncio.gather(*reads, return_exceptions=True)
        refused = [item for item in firsts if isinstance(item, grpc.aio.AioRpcError)]
        assert refused
        assert any(isinstance(item, pb.GenerateResponse) for item in firsts)
        for error in refused:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            details = [detail.TypeName() for detail in rpc_status.from_call(error).details]
            assert "google.rpc.RetryInfo" in details
        for call in calls:
            call.cancel()
        await api.until_free()


async def test_a_drain_that_takes_too_long_cuts_what_is_open(world: tuple[World, MemoryStore]) -> None:
    """A drain that exceeds its time ends open streams with SHUTTING_DOWN and a delay, and frees sequences."""
    async with opened(world) as api:
        request = pb.GenerateRequest(model="rs", token_ids=TOKENS, sampling=greedy(240))
        events = aiter(api.stub.Generate(request))
        await anext(events)
        draining = asyncio.create_task(api.server.drain(0, api.ready.engine.cut))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in events:
                pass
        assert not await draining
        status = rpc_status.from_call(caught.value)
        assert fault_of(caught.value).reason == "SHUTTING_DOWN"
        assert "google.rpc.RetryInfo" in [detail.TypeName() for detail in status.details]
        await api.until_free()


async def test_health_and_reflection_answer(api: RpcApi) -> None:
    """The service is SERVING by name, and reflection knows it."""
    stub = health_pb2_grpc.HealthStub(api.channel)
    for service in ("", SERVICE_NAME):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(api.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = {service.name async for answer in call for service in answer.list_services_response.service}
    assert SERVICE_NAME in names


async def test_a_failing_step_ends_every_request_and_the_next_one_works(
    api: RpcApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that raises is INTERNAL for those in it, without a stack trace, and the engine continues."""
    runner = api.ready.engine._engine._runner
    submit, calls = runner.submit, []

    def broken(batch: object) -> object:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("secret detail")
        return submit(batch)

    monkeypatch.setattr(runner, "submit", broken)
    code, reason, _, message = await api.failure(sampling=greedy(9))
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in message
    events = await api.events(sampling=greedy(3))
    assert events[-1].finished.usage.completion_tokens == 3
    await api.until_free()


async def test_logprobs_come_with_bytes(api: RpcApi) -> None:
    """The tokens of an answer and their alternatives come with their bytes."""
    completion = await api.client.complete("base", PROMPT, logprobs=3, **SAMPLED)
    for token, item in zip(completion.token_ids, completion.logprobs, strict=True):
        assert item.token == api.ready.service.text.token_bytes(token)
        assert item.top_tokens == tuple(api.ready.service.text.token_bytes(token) for token, _ in item.top)


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"json_schema": {"enum": ["a", "b"]}}, lambda text: json.loads(text) in ("a", "b")),
        ({"json_schema": '{"type": "boolean"}'}, lambda text: text in ("true", "false")),
        ({"regex": "[xy]{4}"}, lambda text: len(text) == 4 and not set(text) - {"x", "y"}),
        ({"lark": 'start: "a" "b"?'}, lambda text: text in ("a", "ab")),
    ],
)
async def test_constraints_reach_the_model(api: RpcApi, options: dict[str, Any], valid: Any) -> None:
    """Each kind of constraint shapes the answer."""
    closing = {3 + ord(char) - 32: 6.0 for char in '"}:'}
    completion = await api.client.complete(
        "base", PROMPT, n=4, temperature=1.0, seed=1, max_tokens=200, logit_bias=closing, **options
    )
    stopped = [choice.text for choice in completion.choices if choice.reason is FinishReason.STOP]
    assert stopped
    assert all(map(valid, stopped))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "a", "json_object": True}, "constraint"),
        ({"lark": 3}, "constraint"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"n": -1}, "n"),
    ],
)
async def test_what_cannot_be_sent_is_named(api: RpcApi, options: dict[str, Any], named: str) -> None:
    """A value that fits no field is refused before it is sent."""
    with Client(api.server.address) as client, pytest.raises(faults.RequestInvalid) as caught:
        client.complete("base", PROMPT, **options)
    assert [finding.where for finding in caught.value.findings] == [named]


async def test_arguments_that_are_no_object_are_refused(api: RpcApi) -> None:
    """The arguments of a call are a JSON object, and so are the parameters of a tool."""
    broken = {"function": {"name": "f", "arguments": "[1]"}}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"tool_calls": [broken]}, {}, "messages.messages[0].tool_calls.arguments"),
        (
            {"content": "x"},
            {"tools": [{"function": {"name": "f", "parameters": "{"}}]},
            "messages.tools[0].parameters",
        ),
    ]
    for turn, options, named in cases:
        with pytest.raises(faults.RequestInvalid) as caught:
            await api.client.complete("base", [{"role": "assistant", **turn}], **options)
        assert [finding.where for finding in caught.value.findings] == [named]


async def test_masks_and_stops_reach_the_draw(api: RpcApi) -> None:
    """Allowed tokens, bad words and included stop texts work as over HTTP."""
    allowed: dict[str, Any] = {"max_tokens": 30, "temperature": 50.0, "seed": 3, "allowed_token_ids": [36, 37]}
    free = await api.client.complete("base", PROMPT, **allowed)
    assert set(free.text) == {"A", "B"}
    assert "AB" in free.text
    tamed = await api.client.complete("base", PROMPT, **allowed, bad_words="AB")
    assert "AB" not in tamed.text
    assert "BA" in tamed.text
    retained = await api.client.complete("base", PROMPT, **allowed, stop="BA", include_stop_str_in_output=True)
    assert (retained.text, retained.stop_text) == (free.text[: free.text.index("BA") + 2], "BA")
    with pytest.raises(faults.RequestInvalid) as caught:
        await api.client.complete("base", PROMPT, **allowed, bad_words=["A", "B"])
    assert [finding.where for finding in caught.value.findings] == ["allowed_token_ids"]


async def test_prompts_are_cut_salted_and_gone_on_with(api: RpcApi) -> None:
    """The options of a prompt beside the prompt itself have the same effect as over HTTP."""
    with pytest.raises(faults.PromptTooLong):
        await api.client.complete("base", [5] * 3000, max_tokens=2)
    cut = await api.client.complete("base", [5] * 3000, max_tokens=2, truncate_prompt_tokens=-1)
    assert cut.started.prompt_tokens == 2046
    cached = [
        (await api.client.complete("base", PROMPT * 30, max_tokens=1, cache_salt=salt)).usage.cached_tokens > 0
        for salt in (None, "a", "a", "b", None)
    ]
    assert cached == [False, False, True, False, True]
    turns = [{"role": "assistant", "content": "So"}]
    goes_on = await api.client.complete(
        "base", turns, **SAMPLED, add_generation_prompt=False, continue_final_message=True
    )
    assert goes_on.token_ids == (await api.client.complete("base", "<assistant:So", **SAMPLED)).token_ids
    for name, value in (("truncate_prompt_tokens", 0), ("cache_salt", "x" * 257)):
        with pytest.raises(faults.RequestInvalid) as caught:
            await api.client.complete("base", PROMPT, **{name: value})
        assert [finding.where for finding in caught.value.findings] == [name]
    with pytest.raises(faults.PromptTooLong):
        await api.client.complete("base", [5] * 140_000, truncate_prompt_tokens=4)
