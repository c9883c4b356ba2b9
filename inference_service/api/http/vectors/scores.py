"""``POST /score``, ``/rerank`` and ``/classify``: texts as the heads of adapters score them."""

from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired

import numpy as np
from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.http.vectors.embeddings import (
    ClassifyBody,
    PoolingBody,
    PromptUsage,
    RerankBody,
    ScoreBody,
    ScoringBody,
    head_of,
    pooling_requests,
    prompt_usage,
)
from inference_service.api.http.wire.body import in_words_of, read_body
from inference_service.api.http.wire.reply import Reply, while_connected
from inference_service.api.requests.bounds import refused
from inference_service.api.requests.entities import Aggregation, Entity, entities_of
from inference_service.api.requests.pooling import MAX_INPUTS, ScoredPrompt, scored
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import PromptContent, TextPair
from inference_service.core.sequence import Vector
from inference_service.text.spans import Spans
from loramux_shared.routes import MODEL_HEADER


class Score(TypedDict):
    """The score of a pair of texts."""

    object: Literal["score"]
    index: int
    score: float


class Scores(TypedDict):
    """vLLM's answer to pairs of texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage


class Document(TypedDict):
    """The text of a document."""

    text: str


class Ranked(TypedDict):
    """A document among others."""

    index: int
    """Among those of the request."""
    relevance_score: float
    document: NotRequired[Document]


class Ranking(TypedDict):
    """Documents, the best first."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    results: list[Ranked]
    usage: PromptUsage


class Class(TypedDict):
    """The class of a text."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class EntityFields(TypedDict):
    """An entity, or a token with its label, as transformers' token classification pipeline has it."""

    entity: NotRequired[str]
    """The label of a token, where tokens are not aggregated."""
    entity_group: NotRequired[str]
    """The label of an entity, without B- and I-."""
    score: float
    index: NotRequired[int]
    """Place of a token that is not aggregated."""
    word: str
    start: int
    """First character in the text."""
    end: int
    """Character behind the last one."""


class Tagged(TypedDict):
    """The entities of a text."""

    index: int
    entities: list[EntityFields]


class Classes(TypedDict):
    """vLLM's answer about texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Class | Tagged]
    usage: PromptUsage


class Classified(TypedDict):
    """The answer of one model about texts, or those of several, each as that of one."""

    id: str
    object: Literal["list"]
    created: int
    model: str | list[str]
    data: list[Class | Tagged] | list[Classes]
    usage: PromptUsage


class ScoringHead(TypedDict):
    """The fields that all answers of scores have: which version answered, and the tokens of the texts."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PromptUsage


async def score(service: GenerationService, http: HttpRequest) -> Reply[Scores]:
    """Score pairs of texts."""
    body = await read_body(http, ScoreBody)
    with in_words_of(body):
        found = await score_prompts(
            service, http, body, [(body.model, pair) for pair in _pairs(body)], labels=1
        )
    data: list[Score] = [
        {"index": index, "object": "score", "score": _score(body, each)} for index, each in enumerate(found)
    ]
    head, headers = answer_head(found, "score")
    return Reply({**head, "data": data}, headers=headers)


async def rerank(service: GenerationService, http: HttpRequest) -> Reply[Ranking]:
    """Sort documents by their score for a query, best first."""
    body = await read_body(http, RerankBody)
    ranking, headers = await rank_documents(service, http, body, body.model, body.documents)
    return Reply(ranking, headers=headers)


async def rank_documents(
    service: GenerationService, http: HttpRequest, body: RerankBody, model: str, documents: Sequence[str]
) -> tuple[Ranking, Mapping[str, str]]:
    """Return documents as a body asks for them, best first, and the headers."""
    found = await score_documents(service, http, body, model, body.query, documents)
    results: list[Ranked] = [
        {"index": index, "relevance_score": _score(body, found[index])}
        for index in ranks_of(found)[: body.top_n]
    ]
    for each in results if body.return_documents is not False else ():
        each["document"] = {"text": documents[each["index"]]}
    head, headers = answer_head(found, "rerank")
    return {**head, "results": results}, headers


async def score_documents(
    service: GenerationService,
    http: HttpRequest,
    body: PoolingBody,
    model: str,
    query: str,
    documents: Sequence[str],
) -> list[ScoredPrompt]:
    """Return the one score of each document beside a query."""
    with in_words_of(body):
        pairs = [(model, TextPair(query, document)) for document in documents]
        return await score_prompts(service, http, body, pairs, labels=1)


def best_first(scores: Vector) -> list[int]:
    """Return the places of scores [N], the highest first, of equal ones the earlier first.

    They are compared as the head gives them: from 17 on, all probabilities in float32 are 1.
    """
    return [int(place) for place in np.argsort(-scores, kind="stable")]


def ranks_of(found: Sequence[ScoredPrompt]) -> list[int]:
    """Return the places of prompts with one score each, the highest first."""
    return best_first(np.array([each.scores[0] for each in found]))


async def classify(service: GenerationService, http: HttpRequest) -> Reply[Classified]:
    """Return the most likely label of each text, with the probabilities of all, or the entities in it."""
    body = await read_body(http, ClassifyBody)
    models = [body.model] if isinstance(body.model, str) else body.model
    entities = body.aggregation_strategy is not None or body.ignore_labels is not None
    with in_words_of(body):
        if len(models) * len(body.input) > MAX_INPUTS:
            raise refused("model", f"models times inputs at most {MAX_INPUTS}", len(models) * len(body.input))
        prompts = [(model, prompt) for prompt in body.input for model in models]
        of_tokens = True if entities and len(models) == 1 else None
        found = await score_prompts(service, http, body, prompts, of_tokens=of_tokens)
        if body.use_activation is False and any(each.spans for each in found):
            raise refused("use_activation", "true for a model that scores tokens", "false")
    parts = [_classes(body, found[place :: len(models)]) for place in range(len(models))]
    if isinstance(body.model, str):
        [(alone, headers)] = parts
        return Reply({**alone}, headers=headers)
    whole, _ = answer_head(found, "classify")
    answered = {MODEL_HEADER: ",".join(part["model"] for part, _ in parts)}
    return Reply({**whole, "model": models, "data": [part for part, _ in parts]}, headers=answered)


def _classes(body: ClassifyBody, found: Sequence[ScoredPrompt]) -> tuple[Classes, Mapping[str, str]]:
    """Return what one model says of all texts, and the headers."""
    data = [
        _class(index, each, body) if each.spans is None else _tagged(index, each, each.spans, body)
        for index, each in enumerate(found)
    ]
    head, headers = answer_head(found, "classify")
    return {**head, "data": data}, headers


def _class(index: int, found: ScoredPrompt, body: ClassifyBody) -> Class:
    probs = found.values(raw=body.use_activation is False)
    names = found.scorer.head.label_names
    label = names[int(found.scores.argmax())]
    return {"index": index, "label": label, "probs": probs.tolist(), "num_classes": len(names)}


def _tagged(index: int, found: ScoredPrompt, spans: Spans, body: ClassifyBody) -> Tagged:
    ignored = ["O"] if body.ignore_labels is None else body.ignore_labels
    return {
        "index": index,
        "entities": entity_fields(found, spans, body.aggregation_strategy or "none", ignored),
    }


def entity_fields(
    found: ScoredPrompt, spans: Spans, how: Aggregation, ignored: Sequence[str]
) -> list[EntityFields]:
    """Return the entities of a text as transformers' pipeline has them."""
    shares, labels = found.values(raw=False), found.scorer.head.label_names
    return [_entity(each, how) for each in entities_of(spans, shares, labels, how, ignored)]


def _entity(entity: Entity, how: Aggregation) -> EntityFields:
    score, start, end = float(entity.score), entity.start, entity.end
    fields: EntityFields = {"score": score, "word": entity.word, "start": start, "end": end}
    if how == "none":
        return {**fields, "entity": entity.label, "index": entity.place}
    return {**fields, "entity_group": entity.label}


async def score_prompts(
    service: GenerationService,
    http: HttpRequest,
    body: PoolingBody,
    prompts: Sequence[tuple[str, PromptContent]],
    labels: int | None = None,
    *,
    of_tokens: bool | None = False,
) -> list[ScoredPrompt]:
    """Return the scores of each model and prompt, as `scored` has them, while the client is there."""
    requests = pooling_requests(body, prompts, service.score_pooling, http.headers)

    async def everything() -> list[ScoredPrompt]:
        return [each async for each in scored(service, requests, labels=labels, of_tokens=of_tokens)]

    return await while_connected(http.receive, everything())


def _pairs(body: ScoreBody) -> list[TextPair]:
    """Return what is scored: one text beside each of several, or texts one by one. Raise RequestInvalid for
    several of both, and not as many.
    """
    first, second = ((each,) if isinstance(each, str) else each for each in (body.text_1, body.text_2))
    if len(first) == 1:
        first *= len(second)
    elif len(second) == 1:
        second *= len(first)
    if len(first) != len(second):
        raise refused("text_2", f"one text, or {len(first)}, as many as text_1", len(second))
    return [TextPair(*pair) for pair in zip(first, second, strict=True)]


def _score(body: ScoringBody, found: ScoredPrompt) -> float:
    """Return the one score as a probability, or where the body asks for it as the head gives it."""
    return float(found.values(raw=body.use_activation is False)[0])


def answer_head(found: Sequence[ScoredPrompt], kind: str) -> tuple[ScoringHead, Mapping[str, str]]:
    """Return the fields that all answers have, and the headers."""
    prompts = [each.prompt for each in found]
    head = head_of(prompts, kind)
    fields: ScoringHead = {
        "id": head.id,
        "object": "list",
        "created": head.created,
        "model": head.model,
        "usage": prompt_usage(prompts),
    }
    return fields, head.headers
