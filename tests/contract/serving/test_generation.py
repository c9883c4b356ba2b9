"""The features of the APIs, below the APIs, with a tiny model: answers, sampling, limits, scored prompts."""

import asyncio
import time
from contextlib import aclosing
from typing import Any

import pytest
import torch

from inference_service.core.constraint import Constraint
from inference_service.core.request import AnswerDelta, AnswerFinished, Event, PromptScores, Request
from inference_service.core.sequence import Token
from loramux_shared.faults import Fault, QueueFull, RequestInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.service import PROMPT, Service, open_service
from tests.support.steps import engine_of_depth
from tests.support.tiny import VOCAB, World, oracle

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = [3 + (7 * place) % 190 for place in range(100)]
SAMPLED: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "temperature": 1.0, "seed": 3}


async def test_n_answers_are_n_places_in_the_queue(world: tuple[World, MemoryStore]) -> None:
    """A request that does not fit now is refused as a whole, and one that can never fit is out of bounds."""
    service = await open_service(world, max_batch_seqs=1, max_queue=4)
    with pytest.raises(RequestInvalid):
        await service.events(n=5)
    async with aclosing(
        service.ready.service.generate(Request.of("base", PROMPT, n=3, max_tokens=50))
    ) as events:
        await anext(events)
        with pytest.raises(QueueFull):
            await service.events(n=3)
    await service.until_free()
    assert len(await service.answers(n=4, max_tokens=3)) == 4
    await service.ready.engine.stop()


async def test_a_bad_request_does_not_disturb_good_ones(service: Service) -> None:
    """Good answers are the same alone as among requests that are refused, late, left, or ask for much."""
    good: dict[str, Any] = {"n": 2, **SAMPLED}
    expected = await service.answers(LONG, **good)

    async def bad(**fields: Any) -> None:
        with pytest.raises(Fault):
            await service.events(**fields)

    async def left() -> None:
        async with aclosing(service.ready.service.generate(Request.of("rs", PROMPT, n=3))) as events:
            await anext(events)

    found, *_ = await asyncio.gather(
        service.answers(LONG, **good),
        bad(n=500),
        bad(constraint=Constraint("regex", "(")),
        bad(prompt=[9] * 256),
        bad(deadline_s=time.monotonic(), max_tokens=99),
        bad(constraint=Constraint("regex", "a\u1234"), max_tokens=9),  # no token of the model continues it
        left(),
        service.answers(logit_bias=dict.fromkeys(range(VOCAB), -100.0), temperature=100.0, top_p=1e-6),
        service.answers(LONG[:50], prompt_logprobs=20, max_tokens=0),
        service.answers(model="all", constraint=Constraint("json_object"), n=2, max_tokens=9, temperature=1.0),
    )
    assert found == expected


async def test_a_step_ahead_changes_nothing(world: tuple[World, MemoryStore]) -> None:
    """Requests whose draws need the last token get the same answers where steps overlap, as on a GPU."""
    closing = {3 + ord(char) - 32: 6.0 for char in '"}],:'}
    requests: list[dict[str, Any]] = [
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.5, "model": "all", "n": 3},
        {"min_tokens": 9, "logit_bias": {2: 9.0}},
        {"constraint": Constraint("json_object"), "logit_bias": closing, "n": 2, "max_tokens": 24},
        {"prompt_logprobs": 2, "n": 2, "logprobs": 1},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"min_p": 0.05, "top_k": 20},
        {"bad_words": ("AB", "q", "  "), "n": 2, "logit_bias": {3 + ord(char) - 32: 6.0 for char in "ABq "}},
        {
            "allowed_token_ids": (3, 40, 41),
            "bad_words": ("EF",),
            "constraint": Constraint("regex", "[EF]{3,30}"),
        },
    ]
    found = []
    for depth in (0, 1):
        service = await open_service(world, max_batch_tokens=48, build=engine_of_depth(depth))
        fields = {"max_tokens": 12, "temperature": 1.0, "seed": 11}
        answers = await asyncio.gather(*(service.events(LONG, **fields | request) for request in requests))
        found.append([_story(events) for events in answers])
        await service.close()
    assert found[0] == found[1]


def _story(events: list[Event]) -> list[Any]:
    """Return the content of events, however the tokens were grouped."""
    tokens: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, AnswerDelta):
            tokens.setdefault(event.index, []).extend(token.id for token in event.tokens)
    ends = sorted((event.index, event.reason.value) for event in events if isinstance(event, AnswerFinished))
    scored = [token.id for event in events if isinstance(event, PromptScores) for token in event.tokens]
    return [sorted(tokens.items()), ends, scored]


@pytest.mark.parametrize(("model", "max_batch_tokens"), [("base", 1024), ("all", 16)])
async def test_prompt_logprobs_equal_transformers(
    world: tuple[World, MemoryStore], model: str, max_batch_tokens: int
) -> None:
    """Every token of a prompt has the log probability that transformers gives it, in chunks, cached or not."""
    service = await open_service(world, max_batch_tokens=max_batch_tokens)
    with torch.no_grad():
        adapter = world[0].adapters.get(model)
        logits = oracle(world[0].base, adapter)(torch.tensor([LONG])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)
    for _ in range(2):  # the second time, the prefix cache has the prompt
        events = await service.events(LONG, model, max_tokens=2, prompt_logprobs=3)
        (scored,) = [event.tokens for event in events if isinstance(event, PromptScores)]
        _compare(scored, expected)
    await service.close()


def _compare(scored: tuple[Token, ...], expected: torch.Tensor) -> None:
    assert [token.id for token in scored] == LONG
    assert (scored[0].logprob, scored[0].top, scored[0].rank) == (None, (), None)
    for place, token in enumerate(scored[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
        assert token.rank == 1 + int((expected[place] > expected[place, token.id]).sum())
        best = expected[place].topk(3)
        assert [item for item, _ in token.top] == best.indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


async def test_prompts_are_scored_over_preemptions(world: tuple[World, MemoryStore], service: Service) -> None:
    """Every scored prompt is still reported once and whole where memory runs out; answers stay the same."""
    prompts = [LONG[place:] + LONG[:place] for place in range(3)]
    fields: dict[str, Any] = {
        "max_tokens": 60,
        "ignore_eos": True,
        "prompt_logprobs": 0,
        "repetition_penalty": 1.3,
    }
    expected = [await service.events(prompt, **fields) for prompt in prompts]
    tight = await open_service(world, kv_memory_gb=0.0001, max_batch_tokens=64)
    found = await asyncio.gather(*(tight.events(prompt, **fields) for prompt in prompts))
    assert tight.ready.engine.stats.preemptions
    for one, other in zip(expected, found, strict=True):
        assert _tokens(one) == _tokens(other)
        ours, theirs = (next(e for e in each if isinstance(e, PromptScores)).tokens for each in (one, other))
        assert [token.logprob for token in ours[1:]] == pytest.approx([t.logprob for t in theirs[1:]], abs=1e-4)
    await tight.close()


def _tokens(events: list[Event]) -> list[int]:
    return [token.id for event in events if isinstance(event, AnswerDelta) for token in event.tokens]
