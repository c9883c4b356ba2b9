"""``POST /score``, ``/rerank`` and ``/classify``: texts as the heads of adapters score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from inference_service.http.vectors.embeddings import head_of, pooling_requests, prompt_usage
from inference_service.http.vectors.pooling_schema import ClassifyBody, RerankBody, ScoreBody, ScoringBody
from inference_service.http.wire.body import read_body
from inference_service.http.wire.fields import in_words_of
from inference_service.http.wire.reply import Head, Json, json_response
from inference_service.http.wire.stream import while_connected
from inference_service.serving.bounds import refused
from inference_service.serving.pooling import ScoredPrompt, scored
from inference_service.serving.request import Prompt, Request, TextPair
from inference_service.serving.service import GenerationService
from loramux_shared.pooling import Pooling


async def score(service: GenerationService, http: HttpRequest) -> Response:
    """Score pairs of texts."""
    body = await read_body(http, ScoreBody)
    with in_words_of(body):
        found = await _scored(service, http, body, _pairs(body), labels=1)
    data = [
        {"index": index, "object": "score", "score": float(_told(body, each)[0])}
        for index, each in enumerate(found)
    ]
    return _answer(body, found, "score", {"data": data})


async def rerank(service: GenerationService, http: HttpRequest) -> Response:
    """Order documents by how they score beside a query, the best first."""
    body = await read_body(http, RerankBody)
    with in_words_of(body):
        pairs = [TextPair(body.query, document) for document in body.documents]
        found = await _scored(service, http, body, pairs, labels=1)
    scores = [float(_told(body, each)[0]) for each in found]
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
    texts = body.return_documents is not False
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": body.documents[index]}} if texts else {})
        for index in best
    ]
    return _answer(body, found, "rerank", {"results": results})


async def classify(service: GenerationService, http: HttpRequest) -> Response:
    """Tell the most likely label of each text, with the probabilities of all."""
    body = await read_body(http, ClassifyBody)
    with in_words_of(body):
        found = await _scored(service, http, body, body.input)
    data = []
    for index, each in enumerate(found):
        raw = body.use_activation is False
        probs = each.scores if raw else each.scorer.activated(each.scores)
        names = each.scorer.head.label_names
        label = names[int(each.scores.argmax())]
        data.append({"index": index, "label": label, "probs": probs.tolist(), "num_classes": len(names)})
    return _answer(body, found, "classify", {"data": data})


async def _scored(
    service: GenerationService,
    http: HttpRequest,
    body: ScoringBody,
    prompts: Sequence[Prompt],
    labels: int | None = None,
) -> list[ScoredPrompt]:
    requests = pooling_requests(body, prompts, Pooling.LAST, http.headers)
    return await while_connected(http.receive, _everything(service, requests, labels))


async def _everything(
    service: GenerationService, requests: Sequence[Request], labels: int | None
) -> list[ScoredPrompt]:
    return [each async for each in scored(service, requests, labels=labels)]


def _pairs(body: ScoreBody) -> list[TextPair]:
    """Return what is scored: one text beside each of several, or texts one by one.

    Raises:
        RequestInvalid: they are several of both, and not as many.
    """
    first, second = ((each,) if isinstance(each, str) else each for each in (body.text_1, body.text_2))
    if len(first) == 1:
        first *= len(second)
    elif len(second) == 1:
        second *= len(first)
    if len(first) != len(second):
        raise refused("text_2", f"one text, or {len(first)}, as many as text_1", len(second))
    return [TextPair(*pair) for pair in zip(first, second, strict=True)]


def _told(body: ScoringBody, found: ScoredPrompt) -> Sequence[float]:
    """Return scores as the head gives them, or where that is asked for as probabilities."""
    told = found.scorer.activated(found.scores) if body.use_activation else found.scores
    numbers: list[float] = told.tolist()
    return numbers


def _answer(body: ScoringBody, found: Sequence[ScoredPrompt], kind: str, own: Mapping[str, object]) -> Response:
    prompts = [each.prompt for each in found]
    head: Head = head_of(prompts, body, kind)
    whole: Json = {"id": head.id, "object": "list", "created": head.created, "model": head.model}
    return json_response(whole | {"usage": prompt_usage(prompts)} | dict(own), headers=head.headers)
