"""Vectors of texts for the APIs: several prompts at once, answered by one version, in their order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np

from inference_service.adapters.texts import Scorer
from inference_service.api.requests.bounds import countable, refused
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import (
    AnswerFinished,
    AnswerStarted,
    Pooled,
    Request,
    ResolvedModel,
    TextPair,
)
from inference_service.core.sequence import Vector
from inference_service.core.served_model import ServedModel, refused_model
from inference_service.text.spans import Spans
from loramux_shared.bundle.kinds import SILENT, AdapterKind
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
    if len(requests) > 1 and requests[0].model.served is None:
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

    def values(self, *, raw: bool) -> Vector:
        """Return the scores as the head gives them, or as probabilities where its kind of problem has them."""
        return self.scores if raw else self.scorer.activated(self.scores)


async def scored(
    service: GenerationService,
    requests: Sequence[Request],
    *,
    labels: int | None = None,
    of_tokens: bool | None = False,
) -> AsyncGenerator[ScoredPrompt]:
    """Yield the scores of each request, in their order; those of several models read the same tokens of a text.

    Where labels are said, a head must have so many; of_tokens is whether it scores tokens, None for either.
    Raise RequestInvalid for another head or none, and what `GenerationService.generate` does.
    """
    heads: dict[str, tuple[ResolvedModel, Scorer]] = {}
    for request in requests:
        if request.model.name not in heads:
            heads[request.model.name] = await _head(service, request, labels, of_tokens=of_tokens)
    tokens = {name for name, (_, scorer) in heads.items() if scorer.head.of_tokens}
    spans: dict[str, Spans] = {}
    if tokens or len(heads) > 1:
        spans = await asyncio.to_thread(_spans, service, requests, tokens)
    resolved = [_reading(request, *heads[request.model.name], spans) for request in requests]
    async with aclosing(pooled(service, resolved)) as found:
        places = iter(requests)
        async for prompt in found:
            request = next(places)
            scorer, content = heads[request.model.name][1], request.prompt.content
            if scorer.head.of_tokens:
                scores = await asyncio.to_thread(scorer.scores, prompt.vector)
                yield ScoredPrompt(prompt, scorer, scores, spans[str(content)])
            else:
                yield ScoredPrompt(prompt, scorer, scorer.scores(prompt.vector))


async def _head(
    service: GenerationService, request: Request, labels: int | None, *, of_tokens: bool | None
) -> tuple[ResolvedModel, Scorer]:
    """Return the model of a request and its score head; raise RequestInvalid where `scored` does."""
    served = await service.choose(request)
    model = served.model
    by_base = service.text.pairs.instruction is not None and _has_the_bases_head(model)
    if model.num_labels is None and not by_base:
        does = "makes vectors of texts" if AdapterKind.ENCODER in model.kinds else "generates text"
        expected = "an adapter with a score head, of task_type SEQ_CLS or TOKEN_CLS"
        raise refused_model(model.name, expected, f"one that {does}", "Name such an adapter as model.")
    scorer = await service.scorer(ServedModel(model.name) if by_base else model)
    _require(scorer, model, of_tokens=of_tokens)
    if labels is not None and scorer.head.num_labels != labels:
        raise refused_model(
            model.name,
            f"a score head of {labels} label",
            f"one of {scorer.head.num_labels}",
            "Ask /classify for all of them.",
        )
    return served, scorer


def _has_the_bases_head(model: ServedModel) -> bool:
    """Return whether the logits of an adapter, or of a blend, are those of the base's own head."""
    own = SILENT | {AdapterKind.HEAD, AdapterKind.TOKENS}
    return all(each.kinds and own.isdisjoint(each.kinds) for each in model.parts or (model,))


def _require(scorer: Scorer, model: ServedModel, *, of_tokens: bool | None) -> None:
    """Raise RequestInvalid for a head that scores tokens where one of texts is asked for, or the other way."""
    if of_tokens in (None, scorer.head.of_tokens):
        return
    expected, found, fix = "a score head of tokens", "one of texts", "Leave out what is for tokens alone."
    if scorer.head.of_tokens:
        expected, found, fix = found, expected, "Ask POST /classify for its entities."
    raise refused_model(model.name, expected, found, fix)


def _reading(request: Request, served: ResolvedModel, scorer: Scorer, spans: Mapping[str, Spans]) -> Request:
    """Return a request for the states that a head reads, with its text as tokens where these are known."""
    content, pooling = request.prompt.content, scorer.head.pooling or request.output.pooling
    if isinstance(content, str) and content in spans:
        request = replace(request, prompt=replace(request.prompt, content=spans[content].ids))
    return replace(request.answered_by(served), output=replace(request.output, pooling=pooling))


def _spans(
    service: GenerationService, requests: Sequence[Request], of_tokens: Collection[str]
) -> dict[str, Spans]:
    """Return texts as tokens; raise RequestInvalid for token ids of models that score tokens."""
    found: dict[str, Spans] = {}
    for request in requests:
        prompt, longest = request.prompt, service.limits.max_seq_len
        content, cut, side = prompt.content, prompt.truncate_prompt_tokens, prompt.truncation_side or "right"
        if isinstance(content, str) and content not in found:
            special, most = prompt.add_special_tokens is not False, longest if cut == -1 else cut
            looked_at = longest if cut is None else countable(longest)
            spans = service.text.encode_spans(content, looked_at, most, side, add_special_tokens=special)
            found[content] = spans
        if not isinstance(content, str) and request.model.name in of_tokens:
            found_two = "two texts" if isinstance(content, TextPair) else "token ids"
            raise refused("prompt", "a text, of whose characters entities are", found_two)
    return found


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
    """Return the first dimensions of a vector, or of each row of several, of length 1 where that is asked for;
    zeros stay zeros.
    """
    cut = vector[..., :dimensions]
    if not normalize:
        return cut
    length = np.linalg.norm(cut.astype(np.float64), axis=-1, keepdims=True)
    unit: Vector = (cut / np.where(length, length, 1.0)).astype(np.float32)
    return unit


def check_dimensions(dimensions: int | None, hidden: int) -> None:
    """Raise RequestInvalid for more numbers of a vector than there are, or fewer than one."""
    if dimensions is not None and not 1 <= dimensions <= hidden:
        problem = "a vector cannot have this many dimensions."
        expected = f"1 to {hidden}, the dimensions of this base's vectors"
        raise RequestInvalid.of_field(problem, "dimensions", expected, str(dimensions))
