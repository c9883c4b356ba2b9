"""The bodies of requests for vectors."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from inference_service.http.openai.schema import Inputs
from inference_service.http.wire.body import Body, Examples, Made, Noun, Same
from inference_service.serving.pooling import MAX_INPUTS


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


class EmbeddingsBody(PoolingBody):
    """``POST /v1/embeddings``."""

    examples: ClassVar[Examples] = {
        "text": {"input": "My order is late."},
        "several": {"input": ["One", "Two"], "encoding_format": "base64", "pooling": "mean"},
    }

    input: Annotated[Inputs, Noun("prompt", also=("token_ids",), taken=False)]
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of float32, little endian."""
    dimensions: int | None = None
    """Number of leading numbers of each vector to return."""
    normalize: bool | None = None
    """vLLM's; vectors have length 1, unless this is false."""
    pooling: str | None = None
    """Ours: last or mean."""


class ScoringBody(PoolingBody):
    """The fields that requests for scores have in common."""

    use_activation: bool | None = None
    """vLLM's: true for probabilities, false for raw scores."""


Texts = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_INPUTS)]


def _documents(value: object) -> object:
    """Take objects with a text, as Cohere's and Jina's clients send them, for their texts."""
    whole = isinstance(value, list) and all(isinstance(each, str) or _is_document(each) for each in value)
    if not whole:
        raise PydanticCustomError("documents", "a list of texts, or of objects with a text and nothing else")
    assert isinstance(value, list)  # noqa: S101 - the line before
    return tuple(each["text"] if isinstance(each, dict) else each for each in value)


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
    documents: Annotated[Texts, BeforeValidator(_documents), Noun("prompt", also=("token_ids",), taken=False)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    """Number of results, best first; all when not set."""
    return_documents: bool | None = None
    """Return the texts too; the default."""
    max_tokens_per_doc: None = None
    max_chunks_per_doc: None = None


class ClassifyBody(ScoringBody):
    """``POST /classify``: vLLM's."""

    examples: ClassVar[Examples] = {"text": {"input": "My order is late."}}

    input: Annotated[Inputs, Noun("prompt", also=("token_ids",), taken=False)]
