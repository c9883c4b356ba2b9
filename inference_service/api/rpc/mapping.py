"""Requests, events and models as messages of ``loramux.inference.v1``, in both directions."""

import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Final, TypeVar

from google.protobuf.message import Message as ProtoMessage

from inference_service.api.chat.dialect import dialect_of_model
from inference_service.api.requests.bounds import check_ids, check_texts, countable, role_of, thought_of
from inference_service.api.requests.service import GenerationService
from inference_service.core.adapter import MOST_PARTS, ScaledAdapter
from inference_service.core.constraint import Constraint, Kind
from inference_service.core.request import (
    AnswerDelta,
    AnswerFinished,
    AnswerStarted,
    Event,
    Message,
    ModelReference,
    OutputOptions,
    PromptContent,
    PromptScores,
    Request,
    RequestPrompt,
    SchedulingOptions,
    TokenUsage,
    hinted,
)
from inference_service.core.sampling import KNOBS, Sampling
from inference_service.core.sequence import EndReason, Token
from inference_service.core.served_model import ServedModel
from inference_service.text.text import Text
from loramux.inference.v1 import inference_pb2 as pb
from loramux.mapping import plain
from loramux.messages import stamp
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.rpc.status import Context
from loramux_shared.untrusted_json import JsonInvalid, parse_json

# With 20 alternatives each, a message stays below 1 MB: clients take 4 MB by default.
PROMPT_TOKENS: Final = 1024
_KINDS: Mapping[str, Kind] = {
    "json_object": "json_object",
    "json_schema": "json_schema",
    "regex": "regex",
    "lark": "lark",
}
_REASONS = {EndReason.STOP: pb.FINISH_REASON_STOP, EndReason.LENGTH: pb.FINISH_REASON_LENGTH}


def request_from_message(message: pb.GenerateRequest, context: Context, max_seq_len: int) -> Request:
    """Return the request that a message describes, with the deadline of its call.

    Raises:
        PromptTooLong: there are more token ids than max_seq_len.
        RequestInvalid: a required field is not set, one holds JSON text that is none, or metadata is wrong.
    """
    if unset := [Finding(code="E_MISSING_FIELD", where=name, expected=what) for name, what in _unset(message)]:
        raise RequestInvalid(f"the request lacks {' and '.join(each.where for each in unset)}.", unset)
    remaining, sampling = context.time_remaining(), message.sampling
    cut = optional(message, "truncate_prompt_tokens", message.truncate_prompt_tokens)
    special = optional(message, "add_special_tokens", message.add_special_tokens)
    turns = message.messages
    prompt = RequestPrompt(
        prompt_of(message, max_seq_len if cut is None else countable(max_seq_len)),
        tools=tools_of(message),
        chat_template_kwargs=variables_of(message),
        add_generation_prompt=not turns.HasField("add_generation_prompt") or turns.add_generation_prompt,
        continue_final_message=turns.continue_final_message,
        add_special_tokens=special,
        truncate_prompt_tokens=cut,
    )
    output = OutputOptions(
        n=sampling.n if sampling.HasField("n") else 1,
        constraint=constraint_of(message),
        skip_special_tokens=not sampling.HasField("skip_special_tokens") or sampling.skip_special_tokens,
    )
    scheduling = SchedulingOptions(
        message.priority,
        None if remaining is None else time.monotonic() + remaining,
        message.cache_salt or None,
    )
    hints = hinted(texts_of(context), message.min_generation, message.sticky_key)
    model = ModelReference(message.model, adapters_of(message), None, hints.min_generation, hints.sticky_key)
    return Request(model, prompt, sampling_of(sampling), output, scheduling)


T = TypeVar("T")


def optional(message: ProtoMessage, name: str, value: T) -> T | None:
    """Return the value of an optional field, None where it is not set."""
    return value if message.HasField(name) else None


def sampling_of(message: pb.SamplingParams) -> Sampling:
    """Return the sampling that a message describes; what it does not set is left to the defaults."""
    explicit = message.ListFields()
    return Sampling(**{field.name: plain(value) for field, value in explicit if field.name in KNOBS})


def _unset(message: pb.GenerateRequest) -> Iterator[tuple[str, str]]:
    """Yield the required fields that are not set, each with what is expected."""
    if not message.model and not message.adapters:
        yield "model", "a value"
    if any(not adapter.name for adapter in message.adapters[: MOST_PARTS + 1]):
        yield "adapters", "a value"
    if message.WhichOneof("prompt") is None:
        yield "prompt", "text, token_ids or messages"


def prompt_of(message: pb.GenerateRequest, max_seq_len: int) -> PromptContent:
    """Return the prompt, messages as chat templates know them.

    Raises:
        PromptTooLong: there are more token ids than max_seq_len.
        RequestInvalid: the arguments of a tool call are not a JSON object, or all JSON has too much in it.
    """
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return str(message.text)
    if kind == "token_ids":
        check_ids(message.token_ids.ids, max_seq_len)
        return list(message.token_ids.ids)
    turns = message.messages
    calls = (call.arguments for turn in turns.messages for call in turn.tool_calls)
    check_texts(chain(calls, (tool.parameters for tool in turns.tools), [turns.chat_template_kwargs]))
    return [_turn(index, item) for index, item in enumerate(message.messages.messages)]


def tools_of(message: pb.GenerateRequest) -> tuple[Mapping[str, Any], ...]:
    """Return the tools in the shape of the OpenAI API, which chat templates render; raise RequestInvalid for
    parameters that are no JSON object.
    """
    return tuple(_tool(index, tool) for index, tool in enumerate(message.messages.tools))


def variables_of(message: pb.GenerateRequest) -> Mapping[str, Any]:
    """Return the variables of the chat template; raise RequestInvalid where they are no JSON object."""
    return _object("messages.chat_template_kwargs", message.messages.chat_template_kwargs or "{}")


def constraint_of(message: pb.GenerateRequest) -> Constraint | None:
    """Return the constraint, None where there is none."""
    kind = message.constraint.WhichOneof("kind")
    if kind is None:
        return None
    text = "" if kind == "json_object" else getattr(message.constraint, kind)
    return Constraint(_KINDS[kind], text, f"constraint.{kind}")


def _turn(index: int, message: pb.Message) -> Message:
    calls = [_call(f"messages.messages[{index}]", call) for call in message.tool_calls]
    turn: dict[str, Any] = {"role": role_of(message.role), "content": message.content}
    if calls:
        turn |= {"content": message.content or None, "tool_calls": calls}
    if message.reasoning:
        turn |= thought_of(message.reasoning)
    return turn | _present(message, ("name", "tool_call_id"))


def _call(where: str, call: pb.ToolCall) -> Mapping[str, Any]:
    arguments = _object(f"{where}.tool_calls.arguments", call.arguments or "{}")
    function = {"name": call.name, "arguments": arguments}
    return {"type": "function", "function": function} | _present(call, ("id",))


def _tool(index: int, tool: pb.Tool) -> Mapping[str, Any]:
    function: dict[str, Any] = {"name": tool.name} | _present(tool, ("description",))
    if tool.parameters:
        function["parameters"] = _object(f"messages.tools[{index}].parameters", tool.parameters)
    return {"type": "function", "function": function}


def _present(message: Any, names: Iterable[str]) -> dict[str, str]:
    return {name: value for name in names if (value := getattr(message, name))}


def _object(where: str, text: str) -> Mapping[str, Any]:
    try:
        value = parse_json(text)
    except JsonInvalid as error:
        found = str(error)
    else:
        if isinstance(value, dict):
            return value
        found = type(value).__name__
    problem = f"the request has a field that is no JSON object: {where}."
    raise RequestInvalid.of_field(problem, where, "a JSON object as text", found)


def adapters_of(message: pb.GenerateRequest | pb.EmbedRequest) -> tuple[ScaledAdapter, ...]:
    """Return the adapters of a message with their scales; one too many is refused by the service."""
    return tuple(
        ScaledAdapter(adapter.name, adapter.scale if adapter.HasField("scale") else 1.0)
        for adapter in message.adapters[: MOST_PARTS + 1]
    )


def texts_of(context: Context) -> dict[str, str]:
    """Return the metadata of a call that is text; what comes twice is joined, as RFC 9110 (5.2) says."""
    texts: dict[str, str] = {}
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            texts[name] = f"{texts[name]}, {value}" if name in texts else value
    return texts


def usage_to_message(tokens: TokenUsage) -> pb.Usage:
    """Return the tokens of an answer as a message."""
    return pb.Usage(
        prompt_tokens=tokens.prompt_tokens,
        cached_tokens=tokens.cached_tokens,
        completion_tokens=tokens.completion_tokens,
    )


def event_to_messages(event: Event, text: Text) -> Iterator[pb.GenerateResponse]:
    """Return an event as messages: one, or for a long prompt's log probabilities several."""
    match event:
        case AnswerStarted():
            started = pb.Started(
                request_id=event.request_id,
                model=event.model.name,
                adapter_digest=event.model.digest,
                generation=event.generation,
                prompt_tokens=event.prompt_tokens,
            )
            yield pb.GenerateResponse(started=started)
        case PromptScores():
            for start in range(0, len(event.tokens), PROMPT_TOKENS):
                tokens = [_prompt_token(token, text) for token in event.tokens[start : start + PROMPT_TOKENS]]
                yield pb.GenerateResponse(prompt_logprobs=pb.PromptLogprobs(tokens=tokens))
        case AnswerDelta():
            message = pb.GenerateResponse()
            delta = message.delta  # filled in place: a message that takes other messages copies them
            delta.text = event.text
            delta.token_ids.extend([token.id for token in event.tokens])
            delta.index = event.index
            if scored := [token for token in event.tokens if token.logprob is not None]:
                delta.logprobs.extend([_logprobs(token, text) for token in scored])
            yield message
        case AnswerFinished():
            reason = _REASONS[event.reason]
            finished = pb.Finished(
                reason=reason,
                usage=usage_to_message(event.usage),
                stop_text=event.stop_text,
                index=event.index,
                stop_token_id=event.stop_token_id,
            )
            yield pb.GenerateResponse(finished=finished)


def _prompt_token(token: Token, text: Text) -> pb.PromptToken:
    return pb.PromptToken(
        token_id=token.id,
        logprob=token.logprob,
        top=_top(token, text),
        token=text.token_bytes(token.id),
        rank=token.rank,
    )


def _logprobs(token: Token, text: Text) -> pb.TokenLogprobs:
    spelled = text.token_bytes(token.id)
    return pb.TokenLogprobs(logprob=token.logprob, top=_top(token, text), token=spelled, rank=token.rank)


def _top(token: Token, text: Text) -> list[pb.TopLogprob]:
    return [
        pb.TopLogprob(token_id=token_id, logprob=logprob, token=text.token_bytes(token_id))
        for token_id, logprob in token.top
    ]


def model_to_message(model: ServedModel, service: GenerationService) -> pb.Model:
    """Return a served model as a message."""
    catalog, dialect = service.local.catalog, dialect_of_model(service, model)
    base = model.name == catalog.base_name
    return pb.Model(
        name=model.name,
        parent="" if base else catalog.base_name,
        digest=model.digest,
        ranks=model.ranks,
        modules=model.modules,
        warnings=model.warnings,
        generation=catalog.generation,
        max_seq_len=service.limits.max_seq_len,
        kinds=model.kinds,
        replaced_rows=dict(model.replaced),
        invocation_tokens=model.invocation,
        licence=catalog.base_licence if base else model.licence,
        base_licence="" if base else catalog.base_licence,
        tool_parser=dialect.tool if dialect else "",
        reasoning_parser=dialect.reasoning if dialect else "",
        num_labels=model.num_labels or 0,
        load_time=stamp(model.load_time),
    )
