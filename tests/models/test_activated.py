"""Activated adapters against PEFT's own, token for token in float32, and shared prefixes with the base."""

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from inference_service.core.request import PromptScores
from inference_service.core.sampling import SamplingParams
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.storage.memory import MemoryStore
from tests.support import tiny
from tests.support.service import open_service

NEW = 12
CALLED, PLAIN = (5, 6, 7), (9,)
KINDS: dict[str, dict[str, Any]] = {
    "wide": tiny.ADAPTERS["wide"],
    "called": tiny.ADAPTERS["all"] | {"alora_invocation_tokens": list(CALLED)},
    "asked": tiny.ADAPTERS["wide"] | {"alora_invocation_tokens": list(PLAIN)},
}


def _drawn(draw: random.Random, count: int) -> list[int]:
    """Tokens that call no adapter."""
    return draw.choices(range(10, tiny.VOCAB), k=count)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tiny.World:
    return tiny.make_world_of(tmp_path_factory.mktemp("activated"), LlamaConfig(**tiny.SIZES), KINDS)


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, list[int]]]:
    """Called at the beginning, within a block, at a block's end, by the last token, twice, never."""
    draw = random.Random(6)
    stated = _drawn(draw, 40)
    return [
        ("called", [*stated[:19], *CALLED, *stated[19:30]]),
        ("asked", [*stated[:39], *PLAIN]),
        ("base", stated),
        ("called", [*CALLED, *stated[:11]]),
        ("asked", [*stated[:16], *PLAIN, *stated[16:20]]),
        ("called", [*stated[:9], *CALLED, *stated[9:20], *CALLED, *stated[20:24]]),
        ("wide", [*stated[:19], *CALLED, *stated[19:30]]),
        ("base", [*stated[:19], *CALLED, *stated[19:30]]),
        ("called", [*stated[:20], *CALLED[:2]]),
    ]


@pytest.fixture(scope="module")
def expected(world: tiny.World, requests: list[tuple[str, list[int]]]) -> list[list[int]]:
    models = {name: tiny.oracle(world.base, world.adapters.get(name)) for name in ("base", *KINDS)}
    return [tiny.oracle_tokens(models[name], prompt, NEW) for name, prompt in requests]


@pytest.mark.parametrize(
    ("settings", "preempts"),
    [
        ({"native": True, "speculative_tokens": 6}, False),
        ({"native": False, "max_batch_tokens": 16, "block_size": 8}, False),
        ({"block_size": 8, "kv_memory_gb": 120 * 2 * 2 * 2 * 8 * 4 / 1e9}, True),
    ],
    ids=["compiled", "torch in chunks", "preempted"],
)
def test_the_batch_and_prefix_hits_change_no_token(
    world: tiny.World,
    store: MemoryStore,
    requests: list[tuple[str, list[int]]],
    expected: list[list[int]],
    settings: dict[str, Any],
    preempts: bool,
) -> None:
    """Base, plain and activated adapters in one batch, again with their prefixes found, answer as PEFT does."""
    ready = world.load(store, **settings)
    assert tiny.run_engine(ready, requests, NEW) == expected
    assert tiny.run_engine(ready, requests, NEW) == expected
    assert ready.engine.stats.prefix_tokens_hit > 0
    assert (ready.engine.stats.preemptions > 0) == preempts


@pytest.mark.parametrize(("first", "then"), [("base", "called"), ("called", "base"), ("called", "asked")])
def test_the_blocks_of_a_conversation_are_shared(
    world: tiny.World, store: MemoryStore, first: str, then: str
) -> None:
    """A later request finds 95 of 100 blocks from before any invocation; a plain adapter finds none of them."""
    ready = world.load(store, block_size=4, max_batch_tokens=64)
    calls = {"called": CALLED, "asked": PLAIN}
    emitted, found = _drawn(random.Random(8), 83), []
    for name in (first, then, "wide"):
        prompt = [*emitted, *calls.get(name, ()), 20]
        seq = tiny.sequence(ready, name, name, prompt, SamplingParams(max_tokens=30))
        ready.core.add(seq)
        while not ready.core.idle:
            ready.core.step()
        found.append(seq.progress.num_cached // 4)
        emitted = list(seq.progress.tokens) if name == "base" else emitted
    blocks = (83 + (31 if first == "base" else 0)) // 4
    assert found[0] == found[2] == 0
    assert blocks >= found[1] >= 0.95 * blocks


async def test_a_request_finds_its_place_once_for_all_answers_and_versions(
    world: tiny.World, store: MemoryStore, requests: list[tuple[str, list[int]]], expected: list[list[int]]
) -> None:
    """All n answers are alike, and a name that was switched to another version looks for that one's tokens."""
    service = await open_service((world, store), preload=0)
    stated, call = requests[0][1][:19], requests[0][1][19:]
    prompt = [*stated, *PLAIN, *call]
    with torch.no_grad():
        logits = tiny.oracle(world.base, world.adapters["called"])(torch.tensor([prompt])).logits[0]
    required = torch.log_softmax(logits, -1)[range(len(prompt) - 1), prompt[1:]].tolist()
    fields = {"max_tokens": NEW, "ignore_eos": True}
    events = await service.events(prompt, "called", prompt_logprobs=0, **fields)
    (scored,) = [event.tokens for event in events if isinstance(event, PromptScores)]
    assert [token.logprob for token in scored[1:]] == pytest.approx(required, abs=1e-4)
    assert await service.answers(requests[0][1], model="called", n=2, **fields) == [expected[0]] * 2
    generation = current_generation(store, "tiny")
    switched = generation.adapters | {"called": generation.adapters["asked"]}
    service.ready.adapters.apply(generation.model_copy(update={"adapters": switched, "number": 2}))
    model = tiny.oracle(world.base, world.adapters["asked"])
    assert await service.answers(prompt, model="called", **fields) == [tiny.oracle_tokens(model, prompt, NEW)]
    await service.close()
