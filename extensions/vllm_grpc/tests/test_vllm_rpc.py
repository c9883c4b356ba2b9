"""vLLM's services over a real channel, with a tiny real model behind them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import struct_pb2
from tokenizers import Tokenizer

from inference_service.http.app import create_app
from inference_service.serving.engine_thread import PauseMode
from inference_service.serving.request import AnswerDelta, Request
from loramux_shared.storage.memory import MemoryStore
from loramux_vllm_grpc import engine as engine_api, inference as inference_api
from loramux_vllm_grpc.wire import engine_pb2 as engine, inference_pb2 as inference
from tests.support.service import Service
from tests.support.tiny import World
from tests.support.waiting import until
from tests.vllm_apis import MODEL, PROMPT, VllmApis, archive_of, failure, inference_request, open_apis

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(world: tuple[World, MemoryStore]) -> AsyncIterator[VllmApis]:
    async with open_apis(world) as apis:
        yield apis


@pytest_asyncio.fixture(loop_scope="module")
async def apis(opened: VllmApis) -> AsyncIterator[VllmApis]:
    """The ports of both services, healthy, of an idle engine."""
    await opened.until_free()
    yield opened
    opened.ready.engine.resume()
    await opened.server.set_serving(True)


async def pause(apis: VllmApis) -> None:
    """Pause the engine, and keep its sequences."""
    await apis.ready.engine.pause(PauseMode.KEEP)


async def tokens_of(apis: VllmApis, model: str, **fields: Any) -> list[int]:
    """Return the tokens that the service itself answers."""
    service = Service(apis.ready)
    events = await service.events(PROMPT, model, **({"max_tokens": 6} | fields))
    return [token.id for event in events if isinstance(event, AnswerDelta) for token in event.tokens]


async def test_a_api_stands_for_a_model(apis: VllmApis) -> None:
    """The second endpoint is its adapter's, the first the base's, or the model's that metadata names."""
    named = [("x-loramux-model", "wide")]
    for model, answer in (
        (MODEL, await apis.engine_says(apis.of_model)),
        ("wide", await apis.engine_says(metadata=named)),
        ("base", await apis.engine_says()),
        (MODEL, await apis.engine_says(apis.of_model, named)),
    ):
        assert list(answer[0].complete.output_ids) == await tokens_of(apis, model)
    assert len({tuple(await tokens_of(apis, model)) for model in ("base", "wide", MODEL)}) == 3


async def test_several_answers_and_their_log_probabilities(apis: VllmApis) -> None:
    """Each answer has an index and one end, and log probabilities; those of the prompt come with the first."""
    params = {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": 2, "prompt_logprobs": 1}
    emitted = await apis.engine_says(stream=True, params=params)
    service = Service(apis.ready)
    answers = await service.answers(n=2, temperature=1.0, seed=3, max_tokens=6, prompt_logprobs=1)
    ends = sorted((each.complete for each in emitted if each.HasField("complete")), key=lambda end: end.index)
    assert [end.index for end in ends] == [0, 1]
    assert [list(end.output_ids) for end in ends] == answers
    assert [(end.prompt_tokens, end.completion_tokens) for end in ends] == [(4, 6)] * 2
    for index, expected in enumerate(answers):
        chunks = [each.chunk for each in emitted if each.HasField("chunk") and each.chunk.index == index]
        scored = [token for chunk in chunks for token in chunk.output_logprobs.token_ids]
        assert scored == [token for chunk in chunks for token in chunk.token_ids] == expected
        assert all(len(chunk.token_ids) == chunk.completion_tokens for chunk in chunks)
        assert all(len(top.values) == 2 for chunk in chunks for top in chunk.output_logprobs.top_logprobs)
        assert chunks[0].HasField("input_logprobs") == (index == 0)
    prompt = next(each.chunk.input_logprobs for each in emitted if each.chunk.HasField("input_logprobs"))
    assert list(prompt.token_ids) == PROMPT
    assert [each.HasField("value") for each in prompt.token_logprobs] == [False, True, True, True]


async def test_what_ended_an_answer_is_named(apis: VllmApis) -> None:
    """A stop token and a stop text, and the tokens up to it; a text may be the prompt."""
    whole = await tokens_of(apis, "base")
    [answers] = await apis.engine_says(params={"stop_token_ids": [whole[3]], "temperature": 0.0})
    assert list(answers.complete.output_ids) == whole[: whole.index(whole[3]) + 1]
    assert (answers.complete.finish_reason, answers.complete.matched_token_id) == ("stop", whole[3])
    stop = apis.ready.service.text.decode(whole[2:3])
    [answers] = await apis.engine_says(params={"stop": [stop], "temperature": 0.0}, stream=False)
    assert (answers.complete.finish_reason, answers.complete.matched_stop_str) == ("stop", stop)
    text = apis.ready.service.text.decode(PROMPT)
    [answers] = await apis.engine_says(tokenized=None, text=text)
    assert (list(answers.complete.output_ids), answers.complete.prompt_tokens) == (whole, 4)


async def test_constraints_have_names_of_their_own(apis: VllmApis) -> None:
    """Each of the oneof is kept to, or refused by name."""
    for params, allowed in (
        ({"json_schema": '{"type": "integer"}'}, "-0123456789"),
        ({"regex": "[ab]+"}, "ab"),
        ({"grammar": 'root ::= "x"*'}, "x"),
        ({"choice": engine.ChoiceConstraint(choices=["ba", "ab"])}, "ab"),
    ):
        [answers] = await apis.engine_says(params=params | {"temperature": 0.0})
        text = apis.ready.service.text.decode([token for token in answers.complete.output_ids if token != 2])
        assert text
        assert set(text) <= set(allowed)
    [answers] = await apis.engine_says(params={"json_object": False})
    assert list(answers.complete.output_ids) == await tokens_of(apis, "base")
    for params, named in (
        ({"regex": "["}, ["sampling_params.regex"]),
        ({"choice": engine.ChoiceConstraint()}, ["sampling_params.choice"]),
        ({"structural_tag": "{}"}, ["sampling_params.structural_tag"]),
    ):
        assert await failure(apis.engine_says(params=params)) == ("INVALID_ARGUMENT", "REQUEST_INVALID", named)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tokenized": None}, ["input"]),
        ({"tokenized": engine.TokenizedInput(input_ids=[5, 199])}, ["token_ids"]),
        ({"mm_inputs": engine.MultimodalInputs()}, ["mm_inputs"]),
        ({"extra_mm_inputs": [engine.MultimodalInputs()]}, ["extra_mm_inputs"]),
        (
            {"media_refs": engine.MediaRefs(), "kv_transfer_params_json": ""},
            ["kv_transfer_params_json", "media_refs"],
        ),
        ({"kv_transfer_params": engine.KvTransferParams()}, ["kv_transfer_params"]),
        ({"data_parallel_rank": 1}, ["data_parallel_rank"]),
        ({"request_id": "a b"}, ["request_id"]),
        ({"params": {"logprobs": -1, "temperature": -1.0}}, ["logprobs", "temperature"]),
        ({"params": {"top_p": 1.5, "min_p": 2.0, "n": 999}}, ["min_p", "n", "top_p"]),
    ],
)
async def test_what_is_not_served_is_named(apis: VllmApis, fields: dict[str, Any], named: list[str]) -> None:
    """All at once, before anything runs."""
    answers = await failure(apis.engine_says(**fields))
    assert answers == ("INVALID_ARGUMENT", "REQUEST_INVALID", named)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await apis.engine_says(**fields)
    assert all(name in str(caught.value.details()) for name in named)  # gateways pass on nothing else


async def test_fields_of_other_releases_are_not_dropped(apis: VllmApis) -> None:
    """Numbers that no definition here has are refused in any place; so is other metadata."""
    newer = bytes([0b11111000, 0b00000111, 1])  # number 127, a varint
    request = engine.GenerateRequest.FromString(engine.GenerateRequest(text="a").SerializeToString() + newer)
    request.sampling_params.MergeFromString(newer)

    async def ask(stub: Any, request: Any, **metadata: str) -> list[Any]:
        return [message async for message in stub(request, metadata=tuple(metadata.items()))]

    assert await failure(ask(apis.engine.Generate, request)) == (
        "INVALID_ARGUMENT", "REQUEST_INVALID", ["127", "sampling_params.127"],
    )  # fmt: skip
    plain = inference_request()
    ranked = apis.inference.GenerateStream
    wrong = {"x-data-parallel-rank": "1"}
    assert (await failure(ask(ranked, plain, **wrong)))[2] == ["x-data-parallel-rank"]
    assert await ask(ranked, plain, **{"x-data-parallel-rank": "0"})


async def test_a_caller_ends_its_requests(apis: VllmApis) -> None:
    """An abort ends the caller's requests in each service and frees the sequences; unknown ids pass."""
    params = engine.SamplingParams(max_tokens=240, ignore_eos=True, n=2)
    request = engine.GenerateRequest(request_id="x-1", text="a", sampling_params=params, stream=True)
    call = aiter(apis.engine.Generate(request))
    await anext(call)
    await pause(apis)
    await apis.engine.Abort(engine.AbortRequest(request_ids=["x-1", "x-2"]))
    stated = [message async for message in call]
    ends = [message.complete for message in stated if message.HasField("complete")]
    assert [(end.index, end.finish_reason) for end in ends] == [(0, "abort"), (1, "abort")]
    whole = asyncio.ensure_future(apis.inference.Generate(inference_request(request_id="x-2")))
    await until(lambda: apis.ready.service.in_work, "the request")
    await apis.engine.Abort(engine.AbortRequest(request_ids=["x-2"]))
    assert (await whole).outputs.finish_info.finish_reason == inference.FinishInfo.ABORTED
    apis.ready.engine.resume()
    await apis.until_free()


async def test_a_call_that_ends_early_frees_its_sequence(apis: VllmApis) -> None:
    """A cancelled call, and one whose deadline passes, of each service."""
    params = engine.SamplingParams(max_tokens=240, ignore_eos=True)
    stream = apis.engine.Generate(engine.GenerateRequest(text="a", sampling_params=params, stream=True))
    await stream.read()
    await pause(apis)
    stream.cancel()
    assert (await failure(apis.inference.Generate(inference_request(), timeout=0.05)))[0] == "DEADLINE_EXCEEDED"
    await until(lambda: not apis.ready.service.in_work, "the ends of both")
    whole = apis.inference.Generate(inference_request())
    await until(lambda: apis.ready.service.in_work, "the request")
    whole.cancel()
    await until(lambda: not apis.ready.service.in_work, "its end")
    apis.ready.engine.resume()
    await apis.until_free()


async def test_the_load_is_at_both_paths(apis: VllmApis) -> None:
    """Running, waiting, seats and tokens of the cache are at the two paths that SMG tries."""
    service = apis.ready.service
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as web:
        request = Request.of("base", [5] * 40, n=4, max_tokens=200, ignore_eos=True)
        async with aclosing(service.generate(request)) as events:
            await anext(events)
            await until(lambda: service.engine.stats.running, "a running request")
            await pause(apis)
            await until(lambda: service.engine.stats.waiting + service.engine.stats.running == 4, "all four")
            stats = service.engine.stats
            for path in ("/loads?model=base", "/v1/loads?include=core,disagg,queues,memory"):
                [load] = (await web.get(path)).json()["loads"]
                counts = load["num_running_reqs"], load["num_waiting_reqs"], load["num_total_reqs"]
                assert counts == (stats.running, stats.waiting, stats.running + stats.waiting)
                assert load["utilization"] == stats.running / load["max_running_requests"]
                assert 40 <= load["num_used_tokens"] <= load["max_total_num_tokens"]
                assert load["token_usage"] == load["num_used_tokens"] / load["max_total_num_tokens"]
            apis.ready.engine.resume()


async def test_model_server_and_loads(apis: VllmApis) -> None:
    """A gateway reads these at registration, and every second."""
    for stub, name in ((apis.engine, "base"), (apis.of_model, MODEL)):
        info = await stub.GetModelInfo(engine.GetModelInfoRequest())
        assert (info.served_model_name, info.model_type, list(info.architectures)) == (
            name, "llama", ["LlamaForCausalLM"],
        )  # fmt: skip
        assert (info.max_context_length, info.vocab_size, list(info.eos_token_ids)) == (256, 199, [2])
        assert (info.bos_token_id, info.is_generation, info.supports_vision) == (1, True, False)
        assert "/" not in info.model_path
    server = await apis.engine.GetServerInfo(engine.GetServerInfoRequest())
    stats = apis.ready.engine.stats
    assert (server.max_num_seqs, server.block_size, server.data_parallel_size) == (stats.seats, 16, 1)
    loads = await apis.engine.GetLoads(engine.GetLoadsRequest(include=["core"]))
    assert (loads.dp_rank_count, loads.loads[0].max_total_num_tokens) == (1, stats.blocks_total * 16)
    assert (await failure(apis.engine.GetLoads(engine.GetLoadsRequest(dp_rank=2))))[2] == ["dp_rank"]


async def test_the_tokenizer_comes_as_an_archive(apis: VllmApis, world: tuple[World, MemoryStore]) -> None:
    """The same bytes for the same files; an adapter's chat template stands in place of the base's."""
    files = await archive_of(apis.engine)
    assert "model.safetensors.index.json" not in files
    assert json.loads(files["config.json"])["model_type"] == "llama"
    theirs, ours = Tokenizer.from_str(files["tokenizer.json"].decode()), apis.ready.service.text
    assert theirs.encode("HELLO").ids == ours.encode("HELLO")
    assert await archive_of(apis.engine) == files == await archive_of(apis.of_model)
    model = apis.ready.service.catalog.get(MODEL)
    assert model.defaults is not None

    async def with_template(_digest: str, _name: str) -> Any:
        template = type("Template", (), {"source": "{{ messages }}"})
        return type("Defaults", (), {"template": template, "text": apis.ready.service.text})

    with pytest.MonkeyPatch.context() as patch:
        bare = type(model)(MODEL, model.adapter, defaults=None)
        patch.setitem(apis.ready.service.catalog._models, MODEL, bare)
        patch.setattr(apis.ready.bank.texts, "defaults", with_template)
        own = await archive_of(apis.of_model)
    assert own["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(own["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    theirs = Tokenizer.from_str(own["tokenizer.json"].decode())
    assert theirs.encode("HELLO").ids == ours.encode("HELLO")


ANSWERED = {
    "Generate", "GenerateStream", "Embed", "HealthCheck", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads",
    "GetTokenizer",
}  # fmt: skip


async def test_other_methods_are_refused_by_name(apis: VllmApis) -> None:
    """Every method of both services is answered, or is UNIMPLEMENTED with a reason."""
    stubs = {engine_api: apis.engine, inference_api: apis.inference}
    for api, stub in stubs.items():
        [service] = api.pb.DESCRIPTOR.services_by_name.values()
        assert service.full_name == api.SERVICE_NAME
        for method in service.methods:
            if method.name in ANSWERED:
                continue
            call = getattr(stub, method.name)(method.input_type._concrete_class())
            ended = call.read() if method.server_streaming else call
            assert await failure(ended) == ("UNIMPLEMENTED", "METHOD_UNSUPPORTED", [])


async def test_vllms_own_answers(apis: VllmApis) -> None:
    """Prompt, text, tokens, alternatives and the end, in one message or in several."""
    expected = await tokens_of(apis, "rs")
    response = inference.ResponseOptions(
        prompt_token_ids=True,
        prompt_logprobs=True,
        output_token_ids=True,
        output_logprobs=True,
        output_candidates=inference.CandidateTokens(top_n=2),
    )
    answers = await apis.inference_says(lora_name="rs", response=response)
    assert [each.HasField("prompt_info") for each in answers] == [True] + [False] * (len(answers) - 1)
    prompt = answers[0].prompt_info
    assert (prompt.num_prompt_tokens, list(prompt.token_ids)) == (4, PROMPT)
    assert (prompt.ranks[0], prompt.logprobs[0], len(prompt.logprobs)) == (0, 0.0, 4)
    outputs = [each.outputs for each in answers[1:]]
    assert [token for each in outputs for token in each.token_ids] == expected
    for output in outputs[:-1]:
        assert list(output.ranks) == [1] * len(output.token_ids)
        for candidates, logprob in zip(output.candidate_tokens, output.logprobs, strict=True):
            [second] = candidates.tokens  # the likeliest is what came
            assert (second.rank, second.logprob < logprob) == (2, True)
    end = outputs[-1].finish_info
    assert (end.num_output_tokens, end.finish_reason) == (6, inference.FinishInfo.LENGTH)
    assert end.HasField("num_cached_tokens")
    whole = await apis.inference.Generate(inference_request(lora_name="rs", response=response))
    assert whole.outputs.num_tokens == 6
    assert list(whole.outputs.token_ids) == expected
    assert whole.outputs.text == "".join(output.text for output in outputs)
    assert whole.prompt_info == prompt
    silent = inference.ResponseOptions(output_text=False)
    whole = await apis.inference.Generate(inference_request(model="rs", response=silent))
    assert (whole.outputs.text, list(whole.outputs.token_ids), whole.outputs.num_tokens) == ("", [], 6)


async def test_vllms_own_parameters(apis: VllmApis) -> None:
    """Model and LoRA are SGLang's two names; each field of the groups works as the service's own."""
    answers = await apis.inference.Generate(inference_request(model="base", lora_name="wide"))
    assert list(answers.outputs.token_ids) == await tokens_of(apis, "wide")
    assert (await failure(apis.inference.Generate(inference_request(model="rs", lora_name="wide"))))[2]
    assert (await failure(apis.inference.Generate(inference_request(lora_name="x"))))[1] == "MODEL_NOT_FOUND"
    whole = await tokens_of(apis, "base")
    bias = {whole[0]: -9.0}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"decoding": inference.DecodingParameters(repetition_penalty=1.5)}, {"repetition_penalty": 1.5}),
        ({"decoding": inference.DecodingParameters(logit_bias=bias)}, {"logit_bias": bias}),
        ({"decoding": inference.DecodingParameters(allowed_token_ids=[9, 11])}, {"allowed_token_ids": (9, 11)}),
        ({"temperature": 1.0, "sampling": inference.RandomSampling(seed=5, top_k=9, top_p=0.9, min_p=0.01)},
         {"temperature": 1.0, "seed": 5, "top_k": 9, "top_p": 0.9, "min_p": 0.01}),
        ({"kv": inference.KVCacheParameters(bypass_prefix_cache=True), "priority": 3, "session_id": "s",
          "watermarking": False}, {}),
        ({"truncate_prompt_tokens": 2}, {"truncate_prompt_tokens": 2}),
    ]  # fmt: skip
    for fields, expected in cases:
        answers = await apis.inference.Generate(inference_request(**fields))
        assert list(answers.outputs.token_ids) == await tokens_of(apis, "base", **expected), fields
    constrained = inference.DecodingParameters(
        choice=inference.DecodingParameters.StringChoices(choices=["ba"])
    )
    assert (await apis.inference.Generate(inference_request(decoding=constrained))).outputs.text == "ba"
    words = [inference.TokenIds(ids=whole[:1]), inference.TokenIds(ids=whole[2:4])]
    answers = await apis.inference.Generate(
        inference_request(decoding=inference.DecodingParameters(bad_words_token_ids=words))
    )
    assert whole[0] not in answers.outputs.token_ids
    several = inference.RandomSampling(num_sequences=2)
    answers = await apis.inference_says(sampling=several, temperature=1.0)
    assert {each.outputs.index for each in answers if each.outputs.HasField("finish_info")} == {0, 1}
    assert (await failure(apis.inference.Generate(inference_request(sampling=several))))[2] == [
        "sampling.num_sequences"
    ]


STRUCT = struct_pb2.Struct()
CANDIDATES = inference.CandidateTokens(all=True)
NONE, FOREIGN = [inference.TokenIds()], [inference.TokenIds(ids=[999])]
GATE = inference.EngineReasoningGate(reasoning_ended=False)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"token_ids": None}, ["prompt"]),
        ({"media": [inference.MediaItem()]}, ["media"]),
        ({"kv_hints": inference.KVHintsEnvelope()}, ["kv_hints"]),
        ({"kv": inference.KVCacheParameters(kv_transfer_params=STRUCT)}, ["kv.kv_transfer_params"]),
        ({"kv": inference.KVCacheParameters(ec_transfer_params=STRUCT)}, ["kv.ec_transfer_params"]),
        ({"decoding": inference.DecodingParameters(structural_tag="x")}, ["decoding.structural_tag"]),
        ({"decoding": inference.DecodingParameters(regex="[")}, ["decoding.regex"]),
        ({"decoding": inference.DecodingParameters(bad_words_token_ids=NONE)}, ["bad_words_token_ids"]),
        ({"decoding": inference.DecodingParameters(bad_words_token_ids=FOREIGN)}, ["bad_words_token_ids"]),
        ({"response": inference.ResponseOptions(output_candidates=CANDIDATES, prompt_candidates=CANDIDATES)},
         ["response.output_candidates.all", "response.prompt_candidates.all"]),
        ({"engine_reasoning_gate": GATE, "stopping": inference.StoppingCriteria(thinking_token_budget=0)},
         ["engine_reasoning_gate.reasoning_ended", "stopping.thinking_token_budget"]),
    ],
)  # fmt: skip
async def test_what_of_vllms_own_is_not_served_is_named(
    apis: VllmApis, fields: dict[str, Any], named: list[str]
) -> None:
    """Unserved fields are named in one message or in several."""
    expected = ("INVALID_ARGUMENT", "REQUEST_INVALID", named)
    assert await failure(apis.inference.Generate(inference_request(**fields))) == expected
    assert await failure(apis.inference_says(**fields)) == expected
