"""Requests, events and models as messages of ``loramux.inference.v1``, in both directions."""

from __future__ import annotations

import time
from collections.abc import Mapping

import grpc

from inference_service.core.sequence import FinishReason, Token
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.service import Delta, Event, Finished, Prompt, Request, Started
from loramux.inference.v1 import inference_pb2 as pb
from shared.faults import Finding, RequestInvalid

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def request_from_message(message: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> Request:
    """Return the request that a message describes, with the deadline of its call.

    Raises:
        RequestInvalid: a required field is not set.
    """
    unset = [name for name, missing in _required(message) if missing]
    if unset:
        findings = [Finding(code="E_MISSING_FIELD", where=name, expected="a value") for name in unset]
        raise RequestInvalid(f"the request lacks {' and '.join(unset)}.", findings)
    sampling = message.sampling

    def optional(name: str) -> int | float | None:
        return getattr(sampling, name) if sampling.HasField(name) else None

    remaining = context.time_remaining()
    return Request(
        model=message.model,
        prompt=_prompt(message),
        max_tokens=_int(optional("max_tokens")),
        temperature=optional("temperature"),
        top_p=optional("top_p"),
        top_k=_int(optional("top_k")),
        seed=_int(optional("seed")),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=_int(optional("logprobs")),
        priority=message.priority,
        deadline_s=None if remaining is None else time.monotonic() + remaining,
    )


def _required(message: pb.GenerateRequest) -> list[tuple[str, bool]]:
    return [("model", not message.model), ("prompt", message.WhichOneof("prompt") is None)]


def _prompt(message: pb.GenerateRequest) -> Prompt:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return str(message.text)
    if kind == "token_ids":
        return list(message.token_ids.ids)
    messages: list[Mapping[str, str]] = [
        {"role": item.role, "content": item.content} for item in message.messages.messages
    ]
    return messages


def _int(value: float | None) -> int | None:
    return None if value is None else int(value)


def event_to_message(event: Event) -> pb.GenerateResponse:
    """Return an event as a message."""
    match event:
        case Started():
            started = pb.Started(
                request_id=event.request_id,
                model=event.model.name,
                adapter_digest=event.model.digest,
                generation=event.generation,
                prompt_tokens=event.prompt_tokens,
            )
            return pb.GenerateResponse(started=started)
        case Delta():
            delta = pb.Delta(
                text=event.text,
                token_ids=[token.id for token in event.tokens],
                logprobs=[_logprobs(token) for token in event.tokens if token.logprob is not None],
            )
            return pb.GenerateResponse(delta=delta)
        case Finished():
            usage = pb.Usage(
                prompt_tokens=event.prompt_tokens,
                cached_tokens=event.cached_tokens,
                completion_tokens=event.completion_tokens,
            )
            finished = pb.Finished(reason=_REASONS[event.reason], usage=usage, stop_text=event.stop_text)
            return pb.GenerateResponse(finished=finished)


def _logprobs(token: Token) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return pb.TokenLogprobs(logprob=token.logprob, top=top)


def model_to_message(model: ServedModel, catalog: Catalog, max_seq_len: int) -> pb.Model:
    """Return a served model as a message."""
    message = pb.Model(
        name=model.name,
        parent="" if model.name == catalog.base_name else catalog.base_name,
        digest=model.digest,
        ranks=model.ranks,
        modules=model.modules,
        warnings=model.warnings,
        generation=catalog.generation,
        max_seq_len=max_seq_len,
    )
    message.load_time.FromDatetime(model.load_time)
    return message
