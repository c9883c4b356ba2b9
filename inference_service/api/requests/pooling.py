"""Vectors of texts for the APIs: several prompts at once, answered by one version, in their order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np

from inference_service.adapters.texts import Scorer
from inference_service.api.requests.bounds import countable, refused
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import AnswerFinished, AnswerStarted, Pooled, Request, RequestPrompt
from inference_service.core.sequence import Vector
from inference_service.core.served_model import ServedModel, refused_model
from inference_service.text.spans import Spans
from loramux_shared.bundle.kinds import AdapterKind
from loramux_shared.faults import Finding, InternalFault, RequestInvalid
from loramux_shared.runtime import OF_DECODERS, Pooling

T = TypeVar("T")
MAX_INPUTS: Final = 2048
"""Texts of one call: as many as OpenAI's API takes."""
AT_ONCE: Final = 64
"""Prompts of one call that wait in the queue at once, or half of it: one call does not fill it."""


@dataclass(frozen=True)
class PooledPrompt:
    """The result of one prompt."""

    started: AnswerStarted
    vector: Vector
    finished: AnswerFinished


async def pooled(service: GenerationService, requests: Sequence[Request]) -> AsyncGenerator[PooledPrompt]:
    """Yield the vector of each request, in their order, as soon as it is there.

    The first failure ends all; nothing runs on when this is closed. Raise what `GenerationService.generate`
    does.
    """
    if len(requests) > 1:
        served = await service.choose(requests[0])
        requests = [request.answered_by(served) for request in requests]
    most = max(1, min(AT_ONCE, service.max_queue // 2))  # the other half is for others
    async with aclosing(_in_order((_pooled(service, request) for request in requests), most)) as found:
        async for each in found:
            yield each


async def _pooled(service: GenerationService, request: Request) -> PooledPrompt:
    async with aclosing(service.generate(request)) as events:
        found = {type(event): event async for event in events}
    started, vector, finished = found.get(AnswerStarted), found.get(Pooled), found.get(AnswerFinished)
    if not (
        isinstance(started, AnswerStarted)
        and isinstance(vector, Pooled)
        and isinstance(finished, AnswerFinished)
    ):
        raise InternalFault("no vector was computed for a prompt. Please report it.")
    if not np.isfinite(vector.vector).all():
        raise InternalFault("the model computes values that are not finite for this prompt. Please report it.")
    return PooledPrompt(started, vector.vector, finished)


async def _in_order(work: Iterable[Coroutine[Any, Any, T]], most: int) -> AsyncGenerator[T]:
    """Yield what coroutines return, in their order, while up to so many of them run."""
    tasks: deque[asyncio.Task[T]] = deque()
    try:
        for each in work:
            tasks.append(asyncio.create_task(each))
            if len(tasks) == most:
                yield await tasks.popleft()
        while tasks:
            yield await tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt and its scores."""

    prompt: PooledPrompt
    scorer: Scorer
    scores: Vector
    """[labels], or of token classification [tokens, labels]"""
    spans: Spans | None = None
    """The tokens of the text, where each has scores."""


async def scored(
    service: GenerationService,
    requests: Sequence[Request],
    *,
    labels: int | None = None,
    of_tokens: bool | None = False,
) -> AsyncGenerator[ScoredPrompt]:
    """Yield the scores of each request, in their order.

    Where labels are said, a head must have so many; of_tokens is whether it scores tokens, None for either.
    Raise RequestInvalid for another head or none, and what `GenerationService.generate` does.
    """
    served = await service.choose(requests[0])
    model = served.model
    if model.num_labels is None:
        does = "makes vectors of texts" if AdapterKind.ENCODER in model.kinds else "generates text"
        expected = "an adapter with a score head, of task_type SEQ_CLS or TOKEN_CLS"
        raise refused_model(model.name, expected, f"one that {does}")
    scorer = await service.scorer(model)
    _require(scorer, model, of_tokens=of_tokens)
    if labels is not None and model.num_labels != labels:
        raise refused_model(
            model.name,
            f"a score head of {labels} label",
            f"one of {model.num_labels}",
            "Ask /classify for all of them.",
        )
    spans = await _spans(service, requests) if scorer.head.of_tokens else []
    resolved = [_reading(request.answered_by(served), scorer) for request in requests]
    for at, each in enumerate(spans):
        resolved[at] = replace(resolved[at], prompt=replace(resolved[at].prompt, content=each.ids))
    async with aclosing(pooled(service, resolved)) as found:
        pending = iter(spans)
        async for prompt in found:
            own = next(pending, None)
            many = own is not None
            scores = (
                (await asyncio.to_thread(scorer.scores, prompt.vector))
                if many
                else scorer.scores(prompt.vector)
            )
            yield ScoredPrompt(prompt, scorer, scores, own)


def _require(scorer: Scorer, model: ServedModel, *, of_tokens: bool | None) -> None:
    """Raise RequestInvalid for a head that scores tokens where one of texts is asked for, or the other way."""
    if of_tokens in (None, scorer.head.of_tokens):
        return
    expected, found, fix = "a score head of tokens", "one of texts", "Leave out what is for tokens alone."
    if scorer.head.of_tokens:
        expected, found, fix = found, expected, "Ask POST /classify for its entities."
    raise refused_model(model.name, expected, found, fix)


def _reading(request: Request, scorer: Scorer) -> Request:
    """Return a request for the states that a head reads."""
    pooling = scorer.head.pooling or request.output.pooling
    return replace(request, output=replace(request.output, pooling=pooling))


async def _spans(service: GenerationService, requests: Sequence[Request]) -> list[Spans]:
    """Return the tokens of texts with the characters of each; raise RequestInvalid for other prompts."""

    def encoded(prompt: RequestPrompt) -> Spans:
        if not isinstance(prompt.content, str):
            raise refused("prompt", "a text, of whose characters entities are", "token ids")
        cut, longest = prompt.truncate_prompt_tokens, service.limits.max_seq_len
        special, most = prompt.add_special_tokens is not False, longest if cut == -1 else cut
        looked_at = longest if cut is None else countable(longest)
        return service.text.encode_spans(prompt.content, looked_at, most, add_special_tokens=special)

    return await asyncio.to_thread(lambda: [encoded(request.prompt) for request in requests])


def pooling_of(
    requested: str | None, usual: Pooling | None, served: Collection[Pooling] = OF_DECODERS
) -> Pooling:
    """Return what a request says, else what is usual for the base, which serves some; raise RequestInvalid for
    another pooling, or for none where nothing is usual.
    """
    if requested in set(served):
        return Pooling(requested)
    expected = " or ".join(served)
    if requested is not None:
        problem = "the pooling is not supported."
        raise RequestInvalid.of_field(problem, "pooling", expected, repr(requested[:80]))
    if usual is None:
        fix = "Set it in the request, or as runtime.pooling in the deployment file."
        finding = Finding(code="E_MISSING_FIELD", where="pooling", expected=expected, fix=fix)
        raise RequestInvalid("the base was trained with a pooling that is not served.", [finding])
    return usual


def shaped(vector: Vector, dimensions: int | None, *, normalize: bool) -> Vector:
    """Return the first dimensions of a vector, of length 1 where that is asked for; zeros stay zeros."""
    cut = vector if dimensions is None else vector[:dimensions]
    length = float(np.linalg.norm(cut.astype(np.float64))) if normalize else 1.0
    return (cut / length).astype(np.float32) if length else cut


def check_dimensions(dimensions: int | None, hidden: int) -> None:
    """Raise RequestInvalid for more numbers of a vector than there are, or fewer than one."""
    if dimensions is not None and not 1 <= dimensions <= hidden:
        problem = "a vector cannot have this many dimensions."
        expected = f"1 to {hidden}, the dimensions of this base's vectors"
        raise RequestInvalid.of_field(problem, "dimensions", expected, str(dimensions))
