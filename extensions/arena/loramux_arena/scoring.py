"""Versions score examples: how likely each finds the right answer, or whether it gives it."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from loramux.client import AsyncClient
from loramux.records import GenerateOptions, Prompt, PromptLogprobs, PromptToken
from loramux_arena.comparison import Comparison, compare
from loramux_arena.examples import Example, by_version
from loramux_shared.faults import Fault, Finding, RequestInvalid


class Score(StrEnum):
    """The ways to score a version by an example."""

    LIKELIHOOD = "likelihood"
    """Log probability per token of the reference as the answer."""
    EXACT = "exact"
    """1 where the greedy answer equals the reference but for white space around both, else 0."""


STICKY: Final = "arena"
"""Key with which an alias stands for one of its models all along."""
SCORING: Final[GenerateOptions] = {"max_tokens": 0, "prompt_logprobs": 0}
"""Options of a request that scores its prompt and has no answer."""


@dataclass(frozen=True)
class Plan:
    """Versions that are compared, the first being the baseline, and how."""

    models: Sequence[str]
    score: Score = Score.LIKELIHOOD
    max_tokens: int = 256
    """Most tokens of an answer; none are generated for likelihoods."""
    concurrency: int = 32
    """Requests that are open at once."""


@dataclass(frozen=True)
class Failure:
    """A request that had no score."""

    model: str
    example: str
    fault: Fault


@dataclass
class Scores:
    """The scores of all versions."""

    by_model: dict[str, dict[str, float]]
    """Scores by version and example."""
    failures: list[Failure] = field(default_factory=list)

    def comparisons(self) -> list[Comparison]:
        """Return each version but the first beside the first; one without a common example is left out."""
        (_, baseline), *others = self.by_model.items()
        found = (compare(model, scores, baseline) for model, scores in others)
        return [each for each in found if each is not None]


async def meet(client: AsyncClient, models: Sequence[str], example: Example) -> None:
    """Ask every version for one token, so that names and loads that fail do so at once.

    Raises:
        Fault: what the server says about the first version that does not answer.
    """
    options: GenerateOptions = {"max_tokens": 1, "temperature": 0.0, "sticky_key": STICKY}
    for model in models:
        try:
            await client.complete(model, example.prompt, **options)
        except Fault as fault:
            raise fault.with_message(f"{model}: {fault.message}") from fault


async def score_all(
    client: AsyncClient,
    plan: Plan,
    examples: Sequence[Example],
    tell: Callable[[], None] = lambda: None,
) -> Scores:
    """Score every example with every version; tell is called after each."""
    scores = Scores({model: {} for model in plan.models})
    jobs = iter(by_version(plan.models, examples, plan.concurrency))

    async def work(jobs: Iterator[tuple[str, Example]]) -> None:
        for model, example in jobs:
            try:
                scores.by_model[model][example.id] = await _score(client, plan, model, example)
            except Fault as fault:
                scores.failures.append(Failure(model, example.id, fault))
            tell()

    async with asyncio.TaskGroup() as group:
        for _ in range(plan.concurrency):
            group.create_task(work(jobs))
    return scores


async def _score(client: AsyncClient, plan: Plan, model: str, example: Example) -> float:
    if plan.score is Score.EXACT:
        options: GenerateOptions = {"max_tokens": plan.max_tokens, "temperature": 0.0, "sticky_key": STICKY}
        answer = await client.complete(model, example.prompt, **options)
        return float(answer.text.strip() == example.reference.strip())
    prompt, scoring = prompt_with_reference(example)
    with_key: GenerateOptions = {**scoring, "sticky_key": STICKY}
    events = [event async for event in client.generate(model, prompt, **with_key)]
    tokens = [token for event in events if isinstance(event, PromptLogprobs) for token in event.tokens]
    return likelihood_of(example.reference, tokens)


def prompt_with_reference(example: Example) -> tuple[Prompt, GenerateOptions]:
    """Return a prompt that ends with the reference, as text or as the assistant's turn, and how to send it."""
    if isinstance(example.prompt, str):
        return example.prompt + example.reference, SCORING
    turns: list[Mapping[str, Any]] = [turn for turn in example.prompt if isinstance(turn, Mapping)]
    options: GenerateOptions = {**SCORING, "continue_final_message": True, "add_generation_prompt": False}
    return [*turns, {"role": "assistant", "content": example.reference}], options


def likelihood_of(reference: str, tokens: Sequence[PromptToken]) -> float:
    """Return the log probability per token of the reference at the end of a prompt.

    A token that begins before the reference, as one may where two texts meet, counts.

    Raises:
        RequestInvalid: the prompt does not end with the reference: the template changes it, or it is empty.
    """
    for candidate in dict.fromkeys((reference, reference.strip())):
        ending = candidate.encode()
        found: list[float] = []
        tail = b""
        for token in reversed(tokens):
            if len(tail) >= len(ending) or token.logprobs is None:
                break
            tail = token.logprobs.token + tail
            found.append(token.logprobs.logprob)
        if ending and tail.endswith(ending):
            return sum(found) / len(found)
    finding = Finding(
        code="E_BAD_FIELD",
        where="reference",
        expected="a text that ends the prompt as it stands",
        found="another ending: the chat template writes answers otherwise" if reference.strip() else "no text",
        fix="Ask with text instead of messages, or leave the line out.",
    )
    raise RequestInvalid("the reference cannot be scored", [finding])
