"""The gRPC door over a real loopback channel, with a tiny real model behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from inference_service.rpc.servicer import SERVICE_NAME, InferenceServicer, register
from inference_service.startup.load import Ready
from loramux.inference.v1 import inference_pb2 as pb
from loramux.inference.v1 import inference_pb2_grpc
from loramux_shared.rpc.server import RpcServer
from loramux_shared.rpc.status import fault_of
from loramux_shared.storage.memory import MemoryStore
from tests.support.service import until_free
from tests.support.tiny import World

TOKENS = pb.TokenIds(ids=[5, 6, 7, 8])


class Door:
    """A running server and a stub."""

    def __init__(self, ready: Ready, server: RpcServer, channel: grpc.aio.Channel) -> None:
        self.ready = ready
        self.server = server
        self.channel = channel
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)

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


async def _open(world: tuple[World, MemoryStore], **settings: object) -> Door:
    ready = world[0].load(world[1], **({"stream_interval_ms": 0} | settings))
    server = RpcServer("127.0.0.1:0", {SERVICE_NAME: partial(register, InferenceServicer(ready.service))})
    address = await server.start()
    ready.engine.start()
    await server.set_serving(True)
    return Door(ready, server, grpc.aio.insecure_channel(address))


async def _close(door: Door) -> None:
    await door.channel.close()
    await door.server.drain(5)
    await door.ready.engine.stop()


@pytest_asyncio.fixture
async def door(world: tuple[World, MemoryStore]) -> AsyncIterator[Door]:
    door = await _open(world)
    yield door
    await _close(door)


async def test_a_stream_is_started_deltas_finished(door: Door) -> None:
    """One Started that says what answers, the tokens, and one Finished with the counts."""
    events = await door.events(model="rs", sampling=pb.SamplingParams(max_tokens=5, ignore_eos=True))
    kinds = [event.WhichOneof("event") for event in events]
    assert [kinds[0], *sorted(set(kinds[1:-1])), kinds[-1]] == ["started", "delta", "finished"]
    assert sum(len(event.delta.token_ids) for event in events) == 5
    started, finished = events[0].started, events[-1].finished
    assert started.model == "rs"
    assert started.adapter_digest == door.ready.service.catalog.get("rs").digest
    assert (started.generation, started.prompt_tokens) == (1, 4)
    assert finished.reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (4, 5)


async def test_tokens_between_first_and_last_come_together(world: tuple[World, MemoryStore]) -> None:
    """With an interval there are fewer messages, the first token comes alone, and no token is lost."""
    door = await _open(world, stream_interval_ms=1000)
    deltas = [
        event.delta for event in await door.events(sampling=pb.SamplingParams(max_tokens=40, ignore_eos=True))
    ]
    counts = [len(delta.token_ids) for delta in deltas[1:-1]]
    assert counts[0] == 1
    assert sum(counts) == 40
    assert len(counts) <= 4
    await _close(door)


async def test_models_are_listed_base_first(door: Door) -> None:
    """The base, then the adapters by name, with what is known of them."""
    models = (await door.stub.ListModels(pb.ListModelsRequest())).models
    assert [model.name for model in models] == ["base", "all", "rs", "wide"]
    assert [model.parent for model in models] == ["", "base", "base", "base"]
    assert list(models[1].ranks) == [2, 4, 12]
    assert list(models[3].modules) == ["attn_q", "attn_v"]
    assert models[0].max_seq_len == 256


async def test_text_and_tokens_agree(door: Door) -> None:
    """The deltas' text is what the tokens decode to, and a text prompt is tokenized."""
    sampling = pb.SamplingParams(max_tokens=8, ignore_eos=True)
    events = await door.events(text="HELLO", sampling=sampling)
    assert events[0].started.prompt_tokens == 5
    ids = [token for event in events for token in event.delta.token_ids]
    text = "".join(event.delta.text for event in events)
    assert len(ids) == 8
    assert text == door.ready.service.text._tokenizer.decode(ids)


async def test_a_stop_text_ends_the_answer_before_it(door: Door) -> None:
    """The stop text is found, not shown, and named; the sequence is freed."""
    sampling = pb.SamplingParams(max_tokens=20, ignore_eos=True)
    whole = "".join(event.delta.text for event in await door.events(sampling=sampling))
    stop = whole[4:6]
    sampling = pb.SamplingParams(max_tokens=20, ignore_eos=True, stop=[stop])
    events = await door.events(sampling=sampling)
    assert "".join(event.delta.text for event in events) == whole[: whole.index(stop)]
    assert events[-1].finished.reason == pb.FINISH_REASON_STOP
    assert (events[-1].finished.stop_text, events[-1].finished.HasField("stop_token_id")) == (stop, False)
    await door.until_free()


async def test_a_stop_token_ends_the_answer_without_its_text(door: Door) -> None:
    """A stop token is reported as a token, named at the end, and has no text."""
    sampling = pb.SamplingParams(max_tokens=8, ignore_eos=True)
    ids = [token for event in await door.events(sampling=sampling) for token in event.delta.token_ids]
    stop = ids[3]
    sampling = pb.SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    events = await door.events(sampling=sampling)
    assert events[-1].finished.reason == pb.FINISH_REASON_STOP
    assert events[-1].finished.stop_token_id == stop
    got = [token for event in events for token in event.delta.token_ids]
    assert got == ids[: ids.index(stop) + 1]
    text = "".join(event.delta.text for event in events)
    assert text == door.ready.service.text._tokenizer.decode(got[:-1])


async def test_logprobs_belong_to_the_tokens(door: Door) -> None:
    """Greedy tokens are the likeliest, and as many alternatives come as were asked for."""
    events = await door.events(sampling=pb.SamplingParams(max_tokens=4, ignore_eos=True, logprobs=3))
    tokens = [token for event in events for token in event.delta.token_ids]
    logprobs = [item for event in events for item in event.delta.logprobs]
    assert len(tokens) == len(logprobs) == 4
    for token, item in zip(tokens, logprobs, strict=True):
        assert (item.top[0].token_id, item.rank) == (token, 1)
        assert len(item.top) == 3
        assert item.logprob == pytest.approx(item.top[0].logprob)
        assert item.logprob <= 0


async def test_an_unknown_model_is_never_the_base(door: Door) -> None:
    """The error lists what is served."""
    code, reason, _, message = await door.failure(model="wid")
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    for name in ("'wid'", "base", "all", "rs", "wide"):
        assert name in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": ""}, ["model"]),
        ({"token_ids": None}, ["prompt"]),
        ({"token_ids": pb.TokenIds(ids=[5, 199])}, ["token_ids"]),
        ({"sampling": pb.SamplingParams(temperature=-1, top_p=0)}, ["temperature", "top_p"]),
        ({"sampling": pb.SamplingParams(temperature=float("nan"))}, ["temperature"]),
        ({"sampling": pb.SamplingParams(max_tokens=0)}, ["max_tokens"]),
        ({"sampling": pb.SamplingParams(stop=[""])}, ["stop"]),
        ({"sampling": pb.SamplingParams(stop=["x"] * 17, logprobs=21)}, ["logprobs", "stop"]),
    ],
)
async def test_fields_out_of_bounds_are_named(door: Door, fields: dict[str, object], named: list[str]) -> None:
    """Every field that is out of bounds is named, all at once."""
    code, reason, violated, _ = await door.failure(**fields)
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert violated == named


async def test_a_prompt_that_does_not_fit_gives_both_numbers(door: Door) -> None:
    """Too long a prompt, and too long an answer, are refused before anything runs."""
    code, reason, _, message = await door.failure(token_ids=pb.TokenIds(ids=[5] * 256))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
    assert "256" in message
    assert "255" in message
    code, reason, _, message = await door.failure(sampling=pb.SamplingParams(max_tokens=253))
    assert reason == "PROMPT_TOO_LONG"
    assert "252" in message


async def test_closing_the_stream_frees_the_sequence(door: Door) -> None:
    """A client that goes away costs nothing beyond the step in progress."""
    request = pb.GenerateRequest(
        model="all", token_ids=TOKENS, sampling=pb.SamplingParams(max_tokens=250, ignore_eos=True)
    )
    call = door.stub.Generate(request)
    await call.read()
    await call.read()
    call.cancel()
    await door.until_free()


async def test_a_deadline_frees_the_sequence(door: Door) -> None:
    """A call whose deadline passes ends as DEADLINE_EXCEEDED, and its sequence is freed."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.events(timeout=0.05, sampling=pb.SamplingParams(max_tokens=252, ignore_eos=True))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await door.until_free()


async def test_a_full_queue_is_said_with_a_delay(world: tuple[World, MemoryStore]) -> None:
    """Beyond the bound a request is refused at once, with RetryInfo."""
    door = await _open(world, max_batch_seqs=1, max_queue=1)
    long = pb.GenerateRequest(
        model="base", token_ids=TOKENS, sampling=pb.SamplingParams(max_tokens=200, ignore_eos=True)
    )
    calls = [door.stub.Generate(long) for _ in range(4)]
    firsts = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
    refused = [item for item in firsts if isinstance(item, grpc.aio.AioRpcError)]
    assert refused
    assert any(isinstance(item, pb.GenerateResponse) for item in firsts)
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = [detail.TypeName() for detail in rpc_status.from_call(error).details]
        assert "google.rpc.RetryInfo" in details
    for call in calls:
        call.cancel()
    await door.until_free()
    await _close(door)


async def test_draining_finishes_open_streams_and_refuses_new_ones(world: tuple[World, MemoryStore]) -> None:
    """After the signal, what runs is finished, what comes is SHUTTING_DOWN, and health says so."""
    door = await _open(world)
    request = pb.GenerateRequest(
        model="rs", token_ids=TOKENS, sampling=pb.SamplingParams(max_tokens=200, ignore_eos=True)
    )
    call = door.stub.Generate(request)
    events = aiter(call)
    await anext(events)
    draining = asyncio.create_task(door.server.drain(20))
    await asyncio.sleep(0)
    _, reason, _, _ = await door.failure()
    assert reason == "SHUTTING_DOWN"
    rest = [event async for event in events]
    assert rest[-1].HasField("finished")
    assert await draining
    await door.ready.engine.stop()
    await door.channel.close()


async def test_a_drain_that_takes_too_long_cuts_what_is_open(world: tuple[World, MemoryStore]) -> None:
    """When the time is over, open streams end with SHUTTING_DOWN and a delay, and their sequences are freed."""
    door = await _open(world)
    sampling = pb.SamplingParams(max_tokens=240, ignore_eos=True)
    events = aiter(door.stub.Generate(pb.GenerateRequest(model="rs", token_ids=TOKENS, sampling=sampling)))
    await anext(events)
    draining = asyncio.create_task(door.server.drain(0, door.ready.engine.cut))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in events:
            pass
    assert not await draining
    status = rpc_status.from_call(caught.value)
    assert fault_of(caught.value).reason == "SHUTTING_DOWN"
    assert "google.rpc.RetryInfo" in [detail.TypeName() for detail in status.details]
    await door.until_free()
    await door.ready.engine.stop()
    await door.channel.close()


async def test_health_and_reflection_answer(door: Door) -> None:
    """The service is SERVING by name, and reflection knows it."""
    stub = health_pb2_grpc.HealthStub(door.channel)
    for service in ("", SERVICE_NAME):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    call = reflection_pb2_grpc.ServerReflectionStub(door.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    names = {service.name async for answer in call for service in answer.list_services_response.service}
    assert SERVICE_NAME in names


async def test_a_failing_step_ends_every_request_and_the_next_one_works(door: Door) -> None:
    """A step that raises is INTERNAL for those in it, without a stack trace, and the engine goes on."""
    runner = door.ready.engine._engine._runner
    submit, calls = runner.submit, []

    def broken(batch: object) -> object:
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("secret detail")
        return submit(batch)  # type: ignore[arg-type]

    runner.submit = broken  # type: ignore[method-assign, assignment]
    code, reason, _, message = await door.failure(sampling=pb.SamplingParams(max_tokens=9, ignore_eos=True))
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in message
    events = await door.events(sampling=pb.SamplingParams(max_tokens=3, ignore_eos=True))
    assert events[-1].finished.usage.completion_tokens == 3
    await door.until_free()


def test_the_folder_of_the_base_is_not_copied(world: tuple[World, MemoryStore], tmp_path: Path) -> None:
    """A LOCAL base is verified and read where it is."""
    world[0].load(world[1], cache_dir=tmp_path, native=False)
    assert not list(tmp_path.rglob("*.safetensors"))
