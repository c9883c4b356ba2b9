"""Log probabilities of prompts, with a tiny model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from inference_service.core.sequence import EndReason, Token
from inference_service.serving.service import AnswerDelta, AnswerFinished, AnswerStarted, Event, PromptScores
from loramux_shared.faults import PromptTooLong
from loramux_shared.storage.memory import MemoryStore
from tests.support.service import LONG, SAMPLED, Service, open_service
from tests.support.tiny import World, oracle

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def test_no_answer_at_all_may_be_asked_for(service: Service) -> None:
    """max_tokens 0 with prompt_logprobs reports the prompt, also one that leaves no room, and draws nothing."""
    for prompt in ([5], LONG, [9] * 256):
        started, scored, finished = await service.events(prompt, max_tokens=0, prompt_logprobs=0)
        assert isinstance(started, AnswerStarted)
        assert isinstance(scored, PromptScores)
        assert isinstance(finished, AnswerFinished)
        assert [token.id for token in scored.tokens] == prompt
        assert (finished.reason, finished.completion_tokens) == (EndReason.LENGTH, 0)
    with pytest.raises(PromptTooLong):
        await service.events([9] * 256, max_tokens=1, prompt_logprobs=0)


async def test_prompt_logprobs_come_once_with_several_answers(service: Service) -> None:
    """They are the request's, not the answers', and do not change what is drawn."""
    events = await service.events(LONG, n=3, prompt_logprobs=1, **SAMPLED)
    assert sum(isinstance(event, PromptScores) for event in events) == 1
    assert await service.answers(LONG, n=3, prompt_logprobs=1, **SAMPLED) == await service.answers(
        LONG, n=3, **SAMPLED
    )


async def test_prompts_are_scored_across_preemptions(
    world: tuple[World, MemoryStore], service: Service
) -> None:
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
        ours, theirs = (
            next(e for e in events if isinstance(e, PromptScores)).tokens for events in (one, other)
        )
        assert [token.logprob for token in ours[1:]] == pytest.approx([t.logprob for t in theirs[1:]], abs=1e-4)
    await tight.close()


def _tokens(events: list[Event]) -> list[int]:
    return [token.id for event in events if isinstance(event, AnswerDelta) for token in event.tokens]
