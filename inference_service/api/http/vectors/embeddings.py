"""``POST /v1/embeddings``: texts as vectors; and the bodies of all requests for vectors and scores."""

import asyncio
import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.http.openai.answers import PromptDetails
from inference_service.api.http.openai.schema import Inputs
from inference_service.api.http.wire.body import (
    Body,
    Examples,
    Made,
    Noun,
    Same,
    in_words_of,
    read_body,
    request_fields,
    unserved,
)
from inference_service.api.http.wire.reply import Head, Reply, while_connected
from inference_service.api.requests.entities import Aggregation
from inference_service.api.requests.pooling import (
    MAX_INPUTS,
    PooledPrompt,
    check_dimensions,
    pooled,
    pooling_of,
    shaped,
)
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import PromptContent, Request, TokenUsage, hinted
from inference_service.core.sequence import Vector
from loramux_shared.runtime import Pooling

T = TypeVar("T")
MAX_MODELS: Final = 64
"""Models of one call."""


class PoolingBody(Body):
    """The fields that requests for vectors and scores have in common."""

    model: Same[str]

    # vLLM's
    truncate_prompt_tokens: Same[int | None] = None
    add_special_tokens: Same[bool | None] = None
    cache_salt: Same[str | None] = None
    request_id: Made[str | None] = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower is earlier."""
    lora_path: Same[str | None] = None
    """SGLang's; the adapter that model names."""

    # ours
    min_generation: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    user: str | None = None
    """Picks among the models of an alias."""

    def cut(self) -> dict[str, Any]:
        """Return the fields of a request that cut its texts, where a body has other fields for that."""
        return {}


class VectorsBody(PoolingBody):
    """The fields that requests for vectors have in common."""

    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Number of leading numbers of each vector to return."""
    normalize: bool | None = None
    """vLLM's; vectors have length 1, unless this is false."""
    pooling: str | None = None
    """Ours: last, mean, or of an encoder cls."""


class EmbeddingsBody(VectorsBody):
    """``POST /v1/embeddings``."""

    examples: ClassVar[Examples] = {
        "text": {"input": "My order is late."},
        "several": {"input": ["One", "Two"], "encoding_format": "base64", "pooling": "mean"},
    }

    input: Annotated[Inputs, Noun("prompt", also=("token_ids",), taken=False)]
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of float32, little endian."""


class ScoringBody(PoolingBody):
    """The fields that vLLM's requests for scores have in common."""

    use_activation: bool | None = None
    """vLLM's: true for probabilities, false for raw scores."""


Texts = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_INPUTS)]


class DocumentText(TypedDict):
    """A document as an object, as Cohere's and Jina's clients send it."""

    text: str


def _documents(value: object) -> object:
    """Take objects with a text for their texts."""
    whole = isinstance(value, list) and all(isinstance(each, str) or _is_document(each) for each in value)
    if not whole:
        raise PydanticCustomError("documents", "a list of texts, or of objects with a text and nothing else")
    assert isinstance(value, list)  # noqa: S101 - the line before
    return tuple(each["text"] if isinstance(each, dict) else each for each in value)


DocumentTexts = Annotated[list[str | DocumentText], Field(min_length=1, max_length=MAX_INPUTS)]
Documents = Annotated[Texts, BeforeValidator(_documents, json_schema_input_type=DocumentTexts)]


def _is_document(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"text"} and isinstance(value["text"], str)


class ScoreBody(ScoringBody):
    """``POST /score``: vLLM's."""

    examples: ClassVar[Examples] = {"one beside several": {"text_1": "late", "text_2": ["Refunds", "Delivery"]}}

    text_1: str | Texts
    text_2: Annotated[str | Texts, Noun("prompt", also=("token_ids",), taken=False)]
    """One text for all of the others, or as many of both."""


class RerankBody(ScoringBody):
    """``POST /v1/rerank``: Jina's and Cohere's, as vLLM has it."""

    examples: ClassVar[Examples] = {
        "the best": {"query": "late", "documents": ["Refunds", "Delivery"], "top_n": 1}
    }

    query: str
    documents: Annotated[Documents, Noun("prompt", also=("token_ids",), taken=False)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    """Number of results, best first; all when not set."""
    return_documents: bool | None = None
    """Return the texts too; the default."""
    rank_fields: Annotated[None, unserved("A document has its text alone; join the fields to it.")] = None
    max_tokens_per_doc: Annotated[None, unserved("Use truncate_prompt_tokens, of query and document.")] = None
    max_chunks_per_doc: Annotated[None, unserved("Use truncate_prompt_tokens, of query and document.")] = None


Models = Annotated[list[str], Field(min_length=1, max_length=MAX_MODELS)]


class ClassifyBody(ScoringBody):
    """``POST /classify``: vLLM's, with the options of transformers' token classification pipeline."""

    examples: ClassVar[Examples] = {"text": {"input": "My order is late."}}

    model: Same[str | Models]  # type: ignore[assignment]  # one body alone has several
    """One, or ours: several, which read the same input."""
    input: Annotated[Inputs, Noun("prompt", also=("token_ids",), taken=False)]
    aggregation_strategy: Aggregation | None = None
    """Of a model that scores tokens: how they become entities; none by default."""
    ignore_labels: list[str] | None = None
    """Likewise: labels of entities that are left out; `O` by default."""


MANY: Final = 1 << 14
"""Numbers that are written on another thread: as JSON, they take some milliseconds."""


class PromptUsage(TypedDict):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Embedding(TypedDict):
    """The vector of an input: numbers, or float32 in little endian as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(TypedDict):
    """The vectors of inputs."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PromptUsage


async def embeddings(service: GenerationService, http: HttpRequest) -> Reply[Embeddings]:
    """Make vectors of texts: their hidden states, pooled."""
    body = await read_body(http, EmbeddingsBody)
    found, vectors = await embedded(service, http, body, body.model, body.input)
    return await answer(found, vectors, base64_=body.encoding_format == "base64")


async def embedded(
    service: GenerationService,
    http: HttpRequest,
    body: VectorsBody,
    model: str,
    prompts: Sequence[PromptContent],
) -> tuple[list[PooledPrompt], list[Vector]]:
    """Return the vectors that a body asks for, and what became of its prompts."""
    with in_words_of(body):
        pooling = pooling_of(body.pooling, service.usual_pooling, service.poolings)
        check_dimensions(body.dimensions, service.limits.hidden_size)
        requests = pooling_requests(body, [(model, each) for each in prompts], pooling, http.headers)
        found = await while_connected(http.receive, everything(service, requests))
    normalize = body.normalize is not False
    return found, [shaped(each.vector, body.dimensions, normalize=normalize) for each in found]


def pooling_requests(
    body: PoolingBody,
    prompts: Sequence[tuple[str, PromptContent]],
    pooling: Pooling,
    headers: Mapping[str, str],
) -> list[Request]:
    """Return a request for each model and prompt; raise RequestInvalid for a wrong header."""
    own: dict[str, Any] = {"pooling": pooling, "max_tokens": 0, "priority": -(body.priority or 0)}
    own |= hinted(headers, body.min_generation or 0, body.user or "")._asdict()
    if body.request_id is not None:
        own["id"] = body.request_id
    fields = request_fields(body) | own | body.cut()
    return [Request.of(**fields | {"model": model, "prompt": prompt}) for model, prompt in prompts]


async def everything(service: GenerationService, requests: Sequence[Request]) -> list[PooledPrompt]:
    """Return what becomes of all requests."""
    return [each async for each in pooled(service, requests)]


def head_of(found: Sequence[PooledPrompt], kind: str) -> Head:
    """Return the headers that name the version."""
    started = found[0].started
    head = Head(f"{kind}-{started.request_id}", started.model.name)
    head.begin(started)
    return head


def prompt_usage(found: Sequence[PooledPrompt]) -> PromptUsage:
    """Return the tokens of all prompts."""
    tokens = TokenUsage.of(each.finished for each in found)
    return {
        "prompt_tokens": tokens.prompt_tokens,
        "total_tokens": tokens.total_tokens,
        "prompt_tokens_details": {"cached_tokens": tokens.cached_tokens},
    }


async def answer(
    found: Sequence[PooledPrompt], vectors: Sequence[Vector], *, base64_: bool
) -> Reply[Embeddings]:
    """Return vectors as OpenAI has them."""
    head = head_of(found, "embd")
    usage = prompt_usage(found)

    def write() -> Reply[Embeddings]:
        data: list[Embedding] = [
            {
                "object": "embedding",
                "index": index,
                "embedding": in_base64(vector) if base64_ else numbers_of(vector),
            }
            for index, vector in enumerate(vectors)
        ]
        whole: Embeddings = {"object": "list", "model": head.model, "usage": usage, "data": data}
        return Reply(whole, headers=head.headers)

    return await written(write, vectors)


async def written(write: Callable[[], T], vectors: Sequence[Vector]) -> T:
    """Return what write returns, which runs on another thread where it has many numbers to write."""
    return await asyncio.to_thread(write) if sum(each.size for each in vectors) > MANY else write()


def in_base64(vector: Vector) -> str:
    """Return the bytes of float32, little endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def numbers_of(vector: Vector) -> list[float]:
    """Return a vector as JSON has it."""
    numbers: list[float] = np.asarray(vector, np.float64).tolist()
    return numbers
