"""What the bodies of requests for vectors may hold."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from inference_service.openai_api.schema import Body, Examples, Inputs


class PoolingBody(Body):
    """What requests for vectors and scores have in common."""

    model: str

    # vLLM's
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    """Lower is earlier."""
    lora_path: str | None = None
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

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of float32, little endian."""
    dimensions: int | None = None
    """So many of the first numbers of each vector."""
    normalize: bool | None = None
    """vLLM's; vectors have length 1, unless this is false."""
    pooling: str | None = None
    """Ours: last or mean."""
