"""Requests for vectors and scores, and their answers, as messages."""

import time
from typing import Final

import numpy as np

from inference_service.api.requests.bounds import check_ids, countable
from inference_service.api.requests.pooling import MAX_INPUTS, PooledPrompt, ScoredPrompt
from inference_service.api.rpc.mapping import adapters_of, optional, texts_of, usage_to_message
from inference_service.core.request import (
    ModelReference,
    OutputOptions,
    PromptContent,
    Request,
    RequestPrompt,
    SchedulingOptions,
    TextPair,
    hinted,
)
from inference_service.core.sampling import Sampling
from inference_service.core.sequence import Vector
from loramux.inference.v1 import inference_pb2 as pb
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.rpc.status import Context
from loramux_shared.runtime import Pooling

NO_NEW_TOKENS: Final = Sampling(max_tokens=0)
_POOLINGS: Final = {pb.POOLING_LAST: Pooling.LAST, pb.POOLING_MEAN: Pooling.MEAN, pb.POOLING_CLS: Pooling.CLS}


def requested_pooling(message: pb.EmbedRequest) -> str | None:
    """Return the pooling that a message asks for; an unknown number stays that number."""
    if message.pooling == pb.POOLING_UNSPECIFIED:
        return None
    return _POOLINGS.get(message.pooling, str(message.pooling))


def requests_from_message(
    message: pb.EmbedRequest | pb.ClassifyRequest,
    context: Context,
    pooling: Pooling,
    max_seq_len: int,
) -> list[Request]:
    """Return a request for each input of a message, with the deadline of its call.

    Raises:
        PromptTooLong: an input has more token ids than max_seq_len.
        RequestInvalid: a required field is not set, there are too many inputs, or metadata is wrong.
    """
    adapters = adapters_of(message) if isinstance(message, pb.EmbedRequest) else ()
    _require(message, named=bool(message.model or adapters))
    remaining = context.time_remaining()
    deadline_s = None if remaining is None else time.monotonic() + remaining
    hints = hinted(texts_of(context), message.min_generation, message.sticky_key)
    model = ModelReference(message.model, adapters, None, hints.min_generation, hints.sticky_key)
    cut = optional(message, "truncate_prompt_tokens", message.truncate_prompt_tokens)
    special = optional(message, "add_special_tokens", message.add_special_tokens)
    most = max_seq_len if cut is None else countable(max_seq_len)
    scheduling = SchedulingOptions(message.priority, deadline_s, message.cache_salt or None)
    prompts = [
        RequestPrompt(_prompt(each, most), add_special_tokens=special, truncate_prompt_tokens=cut)
        for each in message.inputs
    ]
    output = OutputOptions(pooling=pooling)
    return [Request(model, prompt, NO_NEW_TOKENS, output, scheduling) for prompt in prompts]


def _require(message: pb.EmbedRequest | pb.ClassifyRequest, *, named: bool) -> None:
    missing = [] if named else ["model"]
    if not message.inputs or any(each.WhichOneof("input") is None for each in message.inputs):
        missing.append("inputs")
    findings = [Finding(code="E_MISSING_FIELD", where=name, expected="a value") for name in missing]
    if len(message.inputs) > MAX_INPUTS:
        expected, found = f"at most {MAX_INPUTS}", str(len(message.inputs))
        findings.append(Finding(code="E_BAD_FIELD", where="inputs", expected=expected, found=found))
    if findings:
        raise RequestInvalid("the request lacks inputs or a model, or has too many.", findings)


def _prompt(message: pb.TextInput, most: int) -> PromptContent:
    match message.WhichOneof("input"):
        case "text":
            return str(message.text)
        case "pair":
            return TextPair(message.pair.first, message.pair.second)
    check_ids(message.token_ids.ids, most)
    return list(message.token_ids.ids)


def vector_to_message(index: int, prompt: PooledPrompt, vector: Vector) -> pb.EmbedResponse:
    """Return the vector of an input as a message."""
    return pb.EmbedResponse(
        index=index,
        values=np.asarray(vector).tolist(),
        model=prompt.started.model.name,
        adapter_digest=prompt.started.model.digest,
        generation=prompt.started.generation,
        usage=usage_to_message(prompt.finished.usage),
    )


def scores_to_message(index: int, scored: ScoredPrompt) -> pb.ClassifyResponse:
    """Return the scores of an input as a message."""
    started = scored.prompt.started
    return pb.ClassifyResponse(
        index=index,
        scores=scored.scores.tolist(),
        probabilities=scored.values(raw=False).tolist(),
        labels=() if index else scored.scorer.head.label_names,
        model=started.model.name,
        adapter_digest=started.model.digest,
        generation=started.generation,
        usage=usage_to_message(scored.prompt.finished.usage),
    )
