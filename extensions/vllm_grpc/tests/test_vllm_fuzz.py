"""Requests to vLLM's services, mutated or with numbers at their limits: the server fails at none of them."""

from collections.abc import AsyncIterator
from random import Random

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from loramux_shared.storage.memory import MemoryStore
from loramux_vllm_grpc.engine import SERVICE_NAME as ENGINE
from loramux_vllm_grpc.inference import SERVICE_NAME as INFERENCE
from loramux_vllm_grpc.wire import engine_pb2, inference_pb2
from tests.fuzz.apis import SAMPLED, outcome
from tests.fuzz.mutate import bounded, mutated_message
from tests.fuzz.numbers import NUMBERS, in_turn, on_the_wire, wire_fields
from tests.support.tiny import World
from tests.vllm_apis import open_apis

pytestmark = pytest.mark.asyncio(loop_scope="module")


def messages() -> dict[str, list[Message]]:
    """Return valid requests of vLLM's services."""
    same = (
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "seed",
    )
    params = engine_pb2.SamplingParams(
        **{name: SAMPLED[name] for name in same},
        logprobs=2,
        prompt_logprobs=1,
        regex="[a-z]+",
        logit_bias={5: 1.5},
    )
    tokens = engine_pb2.TokenizedInput(input_ids=[5, 6], original_text="ab")
    ask = inference_pb2.GenerateRequest(
        lora_name="wide",
        text="Hello",
        temperature=1.0,
        sampling=inference_pb2.RandomSampling(top_k=5, top_p=0.9, min_p=0.01, seed=3),
        decoding=inference_pb2.DecodingParameters(
            presence_penalty=0.5,
            allowed_token_ids=range(3, 99),
            bad_words_token_ids=[inference_pb2.TokenIds(ids=[7, 8])],
            logit_bias={5: 1.5},
        ),
        stopping=inference_pb2.StoppingCriteria(
            max_new_tokens=2, min_new_tokens=1, stop_strings=["END"], stop_token_ids=[7]
        ),
        response=inference_pb2.ResponseOptions(
            output_logprobs=True,
            output_candidates=inference_pb2.CandidateTokens(top_n=2),
            prompt_token_ids=True,
        ),
        kv=inference_pb2.KVCacheParameters(cache_salt="s", bypass_prefix_cache=True),
        truncate_prompt_tokens=50,
        priority=1,
        session_id="s",
    )
    return {
        f"/{ENGINE}/Generate": [
            engine_pb2.GenerateRequest(request_id="r", tokenized=tokens, sampling_params=params, stream=True),
            engine_pb2.GenerateRequest(text="Hello", sampling_params=params),
        ],
        f"/{ENGINE}/Embed": [engine_pb2.EmbedRequest(request_id="r", tokenized=tokens)],
        f"/{ENGINE}/Abort": [engine_pb2.AbortRequest(request_ids=["r"])],
        f"/{ENGINE}/GetLoads": [engine_pb2.GetLoadsRequest(dp_rank=0, include=["core"])],
        f"/{INFERENCE}/Generate": [ask],
        f"/{INFERENCE}/GenerateStream": [ask],
    }


MESSAGES = messages()
"""Messages of the methods that read something and leave the replica as it is."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(world: tuple[World, MemoryStore]) -> AsyncIterator[grpc.aio.Channel]:
    """A client of a tiny model; every valid request succeeds."""
    async with open_apis(world, max_queue=8) as apis, grpc.aio.insecure_channel(apis.addresses[0]) as opened:
        for path, requests in MESSAGES.items():
            for request in requests:
                assert await outcome(opened, path, request.SerializeToString()) == "OK", path
        yield opened


@pytest.mark.parametrize("cases", [range(100), pytest.param(range(100, 4000), marks=pytest.mark.sweep)])
async def test_mutated_messages(channel: grpc.aio.Channel, cases: range) -> None:
    """A mutated message is never INTERNAL, and every refusal has a reason."""
    with bounded() as watch:
        for number in cases:
            rng = Random(number)
            method = rng.choice(sorted(MESSAGES))
            data = mutated_message(rng.choice(MESSAGES[method]), rng)
            with watch.case(f"{method} {number}"):
                watch.note(await outcome(channel, method, data))
    assert watch.outcomes["OK"] > len(cases) / 100


@pytest.mark.parametrize("method", MESSAGES)
async def test_numbers_on_the_wire(channel: grpc.aio.Channel, method: str) -> None:
    """Any number that a client writes gets an answer or the name of the error."""
    with bounded() as watch:
        for turn, path in enumerate(wire_fields(MESSAGES[method][0].DESCRIPTOR)):
            name = ".".join(field.name for field in path)
            for request in MESSAGES[method]:
                for number in in_turn(NUMBERS, turn, 14):
                    more = on_the_wire(path, number)
                    if more is not None:
                        with watch.case(f"{method} {name} {number!r:.40}"):
                            watch.note(await outcome(channel, method, request.SerializeToString() + more))
