"""Routes as Text Embeddings Inference has them.

Its clients name no model.
"""

import asyncio
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Final, Literal, NotRequired, Self

import numpy as np
from pydantic import ConfigDict, Field, RootModel, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.http.admin.operators import manager_of
from inference_service.api.http.openai.schema import NOT_NULL, Inputs
from inference_service.api.http.vectors.embeddings import (
    Documents,
    PoolingBody,
    RerankBody,
    Texts,
    VectorsBody,
    embedded,
    everything,
    head_of,
    numbers_of,
    pooling_requests,
    written,
)
from inference_service.api.http.vectors.scores import (
    EntityFields,
    Ranking,
    answer_head,
    best_first,
    entity_fields,
    rank_documents,
    ranks_of,
    score_documents,
    score_prompts,
)
from inference_service.api.http.wire.body import Body, Examples, Noun, Same, in_words_of, read_body
from inference_service.api.http.wire.reply import Reply, while_connected
from inference_service.api.requests.bounds import refused
from inference_service.api.requests.entities import Aggregation
from inference_service.api.requests.pooling import MAX_INPUTS, ScoredPrompt
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import PromptContent, TextPair
from inference_service.core.sequence import Vector
from inference_service.core.served_model import refused_model
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.runtime import Pooling
from loramux_shared.wording import listed

OF_DOCUMENTS: Final = ("top_n", "return_documents", "use_activation")
OF_TEXTS: Final = ("raw_scores", "return_text")
"""Fields of `/rerank` that go with documents, and with texts."""
DOCUMENTS_OR_TEXTS: Final[dict[str, Any]] = {
    "oneOf": [
        {
            "required": ["model", "documents"],
            "properties": {"model": NOT_NULL, "documents": NOT_NULL}
            | {name: {"type": "null"} for name in ("texts", *OF_TEXTS)},
        },
        {
            "required": ["texts"],
            "properties": {"texts": NOT_NULL}
            | {name: {"type": "null"} for name in ("documents", *OF_DOCUMENTS)},
        },
    ]
}


class TeiBody(PoolingBody):
    """The fields that all bodies of Text Embeddings Inference have."""

    model: Same[str | None] = None  # type: ignore[assignment]  # the others must name one
    """Ours; when not set the one that the caller's key opens, else the base."""
    truncate: bool | None = None
    """Cut longer texts, which are refused otherwise."""
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    """The end that is left out; the right one by default."""

    def cut(self) -> dict[str, Any]:
        """Return the fields of a request that cut its texts."""
        if not self.truncate:
            return {}
        side = (self.truncation_direction or "right").lower()
        return {"truncate_prompt_tokens": self.truncate_prompt_tokens or -1, "truncation_side": side}


class InputsBody(TeiBody):
    """The fields of requests for vectors."""

    inputs: Annotated[Inputs, Noun("prompt", also=("token_ids",), taken=False)]
    prompt_name: str | None = None
    """Name of a text of the base's `config_sentence_transformers.json`, to put in front of each input."""


class SparseBody(InputsBody):
    """``POST /embed_sparse``."""

    examples: ClassVar[Examples] = {
        "text": {"inputs": "My order is late."},
        "several": {"inputs": ["One", "Two"], "truncate": True},
    }


class EmbedBody(InputsBody, VectorsBody):
    """``POST /embed``."""

    examples: ClassVar[Examples] = {
        "text": {"inputs": "My order is late."},
        "several": {"inputs": ["One", "Two"], "normalize": False, "truncate": True},
    }


TextOrPair = Annotated[list[str], Field(min_length=1, max_length=2)]
"""A text, or a pair of texts."""


class PredictParameters(Body):
    """Options of huggingface_hub's client."""

    aggregation_strategy: Aggregation | None = None
    ignore_labels: list[str] | None = None


class PredictBody(TeiBody):
    """``POST /predict``."""

    examples: ClassVar[Examples] = {
        "text": {"inputs": "My order is late."},
        "several": {"inputs": [["One"], ["Two"]], "raw_scores": True},
    }

    inputs: Annotated[
        str | TextOrPair | Annotated[list[TextOrPair], Field(min_length=1, max_length=MAX_INPUTS)],
        Noun("prompt", also=("token_ids",), taken=False),
    ]
    """A text, a pair of texts, or a list of lists of one or two texts."""
    raw_scores: bool | None = None
    """True for scores, false for probabilities."""
    aggregation_strategy: Aggregation | None = None
    """Ours, as in `/classify`."""
    parameters: PredictParameters | None = None

    @property
    def prompts(self) -> list[PromptContent]:
        """Return the texts, and the pairs of texts."""
        inputs = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        alone = [each for each in inputs if isinstance(each, str)]
        several = [alone] if alone else [each for each in inputs if isinstance(each, list)]
        return [each[0] if len(each) == 1 else TextPair(*each) for each in several]

    @property
    def is_one(self) -> bool:
        """Return True if the answer is that of one text or pair, and no list of answers."""
        return isinstance(self.inputs, str) or isinstance(self.inputs[0], str)


class RanksBody(TeiBody, RerankBody):
    """``POST /rerank``: that of `/v1/rerank`, or Text Embeddings Inference's, which has texts."""

    model_config = ConfigDict(json_schema_extra=DOCUMENTS_OR_TEXTS)
    examples: ClassVar[Examples] = {
        **RerankBody.examples,
        "texts": {"query": "late", "texts": ["Refunds", "Delivery"], "raw_scores": True},
    }

    model: Same[str | None] = None  # type: ignore[assignment]  # as in TeiBody
    """Required with documents."""
    documents: Annotated[Documents | None, Noun("prompt", also=("token_ids",), taken=False)] = None  # type: ignore[assignment]
    texts: Annotated[Texts | None, Noun("prompt", also=("token_ids",), taken=False)] = None
    raw_scores: bool | None = None
    """True for scores, false for probabilities."""
    return_text: bool | None = None
    """Return the texts too."""

    @model_validator(mode="after")
    def _documents_or_texts(self) -> Self:
        if (self.documents is None) == (self.texts is None):
            raise PydanticCustomError("texts", "either documents or texts")
        wrong = [
            name
            for name in (OF_TEXTS if self.texts is None else OF_DOCUMENTS)
            if getattr(self, name) is not None
        ]
        if wrong:
            other = "texts" if self.texts is None else "documents"
            raise PydanticCustomError("texts", f"{wrong[0]} only with {other}")
        return self


class Prediction(TypedDict):
    """A label and its score."""

    score: float
    label: str


class Predictions(
    RootModel[list[Prediction] | list[EntityFields] | list[list[Prediction] | list[EntityFields]]]
):
    """The labels of one text or the entities in it, or a list of these for several."""


class Weight(TypedDict):
    """The weight of a token of the vocabulary."""

    index: int
    """The token."""
    value: float


class SparseVectors(RootModel[list[list[Weight]]]):
    """The tokens with a weight, of each input."""


class Vectors(RootModel[list[list[float]]]):
    """The vectors of inputs."""


class Rank(TypedDict):
    """A text among others."""

    index: int
    """Among those of the request."""
    score: float
    text: NotRequired[str]


class Ranks(RootModel[list[Rank] | Ranking]):
    """Texts, or documents in the shape of `/v1/rerank`, the best first."""


class PooledType(TypedDict):
    """The pooling of texts; null where requests must name one."""

    pooling: str | None


class LabelledType(TypedDict):
    """The labels of a score head."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class ModelType(TypedDict):
    """One of these."""

    embedding: NotRequired[PooledType]
    classifier: NotRequired[LabelledType]
    reranker: NotRequired[LabelledType]


class Info(TypedDict):
    """The model of requests that name none, and what a request may have."""

    model_id: str
    model_sha: str | None
    """Digest of the adapter; null for the base."""
    model_dtype: str
    model_type: ModelType
    max_concurrent_requests: int
    """Sequences that may wait."""
    max_input_length: int
    max_client_batch_size: int
    auto_truncate: Literal[False]
    version: str


async def embed(service: GenerationService, http: HttpRequest) -> Reply[Vectors]:
    """Make vectors of texts: a list of numbers for each."""
    body = await read_body(http, EmbedBody)
    inputs = _inputs_of(body, service.prompts_of_base)
    found, vectors = await embedded(service, http, body, body.model or service.usual_model, inputs)
    headers = head_of(found, "embed").headers
    return await written(lambda: Reply(Vectors([*map(numbers_of, vectors)]), headers=headers), vectors)


async def embed_sparse(service: GenerationService, http: HttpRequest) -> Reply[SparseVectors]:
    """Make sparse vectors of texts, as SPLADE does: the tokens of the vocabulary that have a weight."""
    body = await read_body(http, SparseBody)
    model, inputs = body.model or service.usual_model, _inputs_of(body, service.prompts_of_base)
    if not service.limits.sparse:
        expected = "a base of ...ForMaskedLM with 1_SpladePooling/config.json beside it"
        raise refused_model(model, expected, "one without", "Ask /embed for dense vectors.")
    with in_words_of(body):
        requests = pooling_requests(body, [(model, each) for each in inputs], Pooling.SPARSE, http.headers)
        found = await while_connected(http.receive, everything(service, requests))
    headers = head_of(found, "embed").headers
    return await asyncio.to_thread(
        lambda: Reply(SparseVectors([_weights(each.vector) for each in found]), headers=headers)
    )


def _weights(vector: Vector) -> list[Weight]:
    """Return the tokens of the vocabulary whose weight is not 0."""
    tokens = np.flatnonzero(vector)
    return [{"index": int(token), "value": float(vector[token])} for token in tokens]


def _inputs_of(body: InputsBody, prompts: Mapping[str, str]) -> tuple[PromptContent, ...]:
    """Return inputs, behind the prompt that a body names; raise RequestInvalid where none has that name, or for
    token ids.
    """
    name, inputs = body.prompt_name, body.inputs
    if name is None:
        return inputs
    if name not in prompts:
        raise refused(
            "prompt_name", listed([*map(repr, prompts)], 8, none="none: this base names no prompts"), repr(name)
        )
    texts = [each for each in inputs if isinstance(each, str)]
    if len(texts) < len(inputs):
        raise refused("prompt_name", "inputs that are texts", "token ids")
    return tuple([prompts[name] + text for text in texts])


async def predict(service: GenerationService, http: HttpRequest) -> Reply[Predictions]:
    """Return all labels of texts, the most likely first, or the entities in them: a list for each text."""
    body = await read_body(http, PredictBody)
    options, raw = body.parameters or PredictParameters(), body.raw_scores is True
    how = body.aggregation_strategy or options.aggregation_strategy
    ignored = ["O"] if options.ignore_labels is None else options.ignore_labels
    of_tokens = True if how or options.ignore_labels is not None else None
    with in_words_of(body):
        prompts = [(body.model or service.usual_model, prompt) for prompt in body.prompts]
        found = await score_prompts(service, http, body, prompts, of_tokens=of_tokens)
        if raw and found[0].spans is not None:
            raise refused("raw_scores", "false for a model that scores tokens", "true")
    labelled: list[list[Prediction] | list[EntityFields]] = [
        _labels(each, raw=raw)
        if each.spans is None
        else entity_fields(each, each.spans, how or "none", ignored)
        for each in found
    ]
    _, headers = answer_head(found, "predict")
    return Reply(Predictions(labelled[0] if body.is_one else labelled), headers=headers)


async def rank(service: GenerationService, http: HttpRequest) -> Reply[Ranks]:
    """Sort texts, or documents as `/v1/rerank` does, by their score for a query, best first."""
    body = await read_body(http, RanksBody)
    if body.documents is not None:
        if body.model is None:
            missing = Finding(code="E_MISSING_FIELD", where="model", expected="a value, with documents")
            raise RequestInvalid("the body of the request is not valid.", [missing])
        ranking, headers = await rank_documents(service, http, body, body.model, body.documents)
        return Reply(Ranks(ranking), headers=headers)
    model, texts = body.model or service.usual_model, body.texts or ()
    found = await score_documents(service, http, body, model, body.query, texts)
    scores = [float(each.values(raw=body.raw_scores is True)[0]) for each in found]
    ranks: list[Rank] = [{"index": index, "score": scores[index]} for index in ranks_of(found)]
    for each in ranks if body.return_text else ():
        each["text"] = texts[each["index"]]
    _, headers = answer_head(found, "rerank")
    return Reply(Ranks(ranks), headers=headers)


async def info(service: GenerationService, http: HttpRequest) -> Reply[Info]:
    """Describe the model of requests that name none."""
    model = service.local.catalog.resolve(service.usual_model)
    kind: ModelType = {"embedding": {"pooling": service.usual_pooling}}
    if model.num_labels is not None:
        names = (await service.scorer(model)).head.label_names
        labels: LabelledType = {
            "id2label": {str(place): name for place, name in enumerate(names)},
            "label2id": {name: place for place, name in enumerate(names)},
        }
        kind = {"reranker": labels} if len(names) == 1 else {"classifier": labels}
    return Reply(
        {
            "model_id": model.name,
            "model_sha": model.digest or None,
            "model_dtype": manager_of(http).facts.dtype,
            "model_type": kind,
            "max_concurrent_requests": service.max_queue,
            "max_input_length": service.limits.max_seq_len,
            "max_client_batch_size": MAX_INPUTS,
            "auto_truncate": False,
            "version": version("loramux"),
        }
    )


def _labels(found: ScoredPrompt, *, raw: bool) -> list[Prediction]:
    scores: list[float] = found.values(raw=raw).tolist()
    labels = found.scorer.head.label_names
    return [{"score": scores[place], "label": labels[place]} for place in best_first(found.scores)]
