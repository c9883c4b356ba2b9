"""``POST /pooling``: vectors and probabilities of texts or of their tokens, as vLLM has it."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, ClassVar, Final, Literal

import numpy as np
from starlette.requests import Request as HttpRequest
from typing_extensions import TypedDict

from inference_service.api.http.openai.schema import Inputs
from inference_service.api.http.vectors.embeddings import (
    PromptUsage,
    VectorsBody,
    embedded,
    head_of,
    in_base64,
    pooling_requests,
    prompt_usage,
    written,
)
from inference_service.api.http.vectors.scores import score_prompts
from inference_service.api.http.wire.body import Examples, Noun, in_words_of, read_body
from inference_service.api.http.wire.reply import Reply, while_connected
from inference_service.api.requests.bounds import refused
from inference_service.api.requests.pooling import PooledPrompt, check_dimensions, pooled, shaped
from inference_service.api.requests.service import GenerationService
from inference_service.core.request import Request
from inference_service.core.sequence import Vector
from loramux_shared.runtime import Pooling

MAX_NUMBERS: Final = 1 << 22
"""Numbers of all tokens of a call: 16 MiB of float32."""
OF_VECTORS: Final = ("dimensions", "normalize")
OF_ONE_VECTOR: Final = ("pooling",)
OF_SCORES: Final = ("use_activation",)
NOT_OF: Final = {
    "embed": OF_SCORES,
    "token_embed": (*OF_SCORES, *OF_ONE_VECTOR),
    "classify": (*OF_VECTORS, *OF_ONE_VECTOR),
    "token_classify": (*OF_VECTORS, *OF_ONE_VECTOR),
}
"""Fields that a task does not read, by task."""


class TaskBody(VectorsBody):
    """``POST /pooling``: vLLM's."""

    examples: ClassVar[Examples] = {"text": {"input": "My order is late.", "task": "embed"}}

    input: Annotated[Inputs, Noun("prompt", also=("token_ids",), taken=False)]
    task: Literal["embed", "token_embed", "classify", "token_classify"] | None = None
    """token_embed by default, which encoders alone have."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64 is of float32, little endian."""
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little"] | None = None
    use_activation: bool | None = None
    """False for raw scores."""


class PooledData(TypedDict):
    """The numbers of an input: of a text, of each token, or all of these one behind another as base64."""

    object: Literal["pooling"]
    index: int
    data: list[float] | list[list[float]] | str


class PooledList(TypedDict):
    """The numbers of inputs."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PooledData]
    usage: PromptUsage


async def pool(service: GenerationService, http: HttpRequest) -> Reply[PooledList]:
    """Return the vector of each text or of each of its tokens, or the probabilities of its labels."""
    body = await read_body(http, TaskBody)
    task = body.task or "token_embed"
    if wrong := [name for name in NOT_OF[task] if getattr(body, name) is not None]:
        raise refused(wrong[0], f"nothing with task {task}", getattr(body, wrong[0]))
    if task == "embed":
        found, vectors = await embedded(service, http, body, body.model, body.input)
    elif task == "token_embed":
        found, vectors = await _token_vectors(service, http, body)
    else:
        with in_words_of(body):
            prompts = [(body.model, each) for each in body.input]
            scored = await score_prompts(service, http, body, prompts, of_tokens=task == "token_classify")
        raw = body.use_activation is False
        found = [each.prompt for each in scored]
        vectors = [each.values(raw=raw) for each in scored]
    return await _answer(found, vectors, base64_=body.encoding_format == "base64")


async def _token_vectors(
    service: GenerationService, http: HttpRequest, body: TaskBody
) -> tuple[list[PooledPrompt], list[Vector]]:
    """Return the vectors of the tokens of each text; raise RequestInvalid for too many, and for a decoder."""
    with in_words_of(body):
        if not service.limits.encodes:
            found = body.task or "token_embed, the default"
            raise refused("task", "embed, classify or token_classify: the base is no encoder", found)
        check_dimensions(body.dimensions, service.limits.hidden_size)
        requests = pooling_requests(
            body, [(body.model, each) for each in body.input], Pooling.ALL, http.headers
        )
        prompts = await while_connected(http.receive, _collect(service, requests))
    rows = [each.vector.reshape(-1, service.limits.hidden_size) for each in prompts]
    normalize = body.normalize is not False
    return prompts, await asyncio.to_thread(
        lambda: [shaped(each, body.dimensions, normalize=normalize) for each in rows]
    )


async def _collect(service: GenerationService, requests: Sequence[Request]) -> list[PooledPrompt]:
    """Return the tokens' states of all requests; raise RequestInvalid for more than `MAX_NUMBERS`."""
    found: list[PooledPrompt] = []
    numbers = 0
    async with aclosing(pooled(service, requests)) as prompts:
        async for each in prompts:
            numbers += each.vector.size
            if numbers > MAX_NUMBERS:
                most = f"at most {MAX_NUMBERS // service.limits.hidden_size} tokens together"
                raise refused("prompt", most, "more")
            found.append(each)
    return found


async def _answer(
    found: Sequence[PooledPrompt], vectors: Sequence[Vector], *, base64_: bool
) -> Reply[PooledList]:
    head, usage = head_of(found, "pool"), prompt_usage(found)

    def write() -> Reply[PooledList]:
        data: list[PooledData] = [
            {
                "object": "pooling",
                "index": index,
                "data": in_base64(vector) if base64_ else vector.astype(np.float64).tolist(),
            }
            for index, vector in enumerate(vectors)
        ]
        whole: PooledList = {
            "id": head.id,
            "object": "list",
            "created": head.created,
            "model": head.model,
            "data": data,
            "usage": usage,
        }
        return Reply(whole, headers=head.headers)

    return await written(write, vectors)
