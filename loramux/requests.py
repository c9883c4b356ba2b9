"""Requests of the inference service from a caller's arguments."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from loramux.inference.v1 import inference_pb2 as pb
from loramux.records import GenerateOptions, Message as Turn, Prompt
from loramux_shared.faults import Finding, RequestInvalid

ADAPTERS: Final = "a list of names, or of (name, scale)"
PROMPTS: Final = "text, a list of token ids, or a list of messages with role and content"
CONSTRAINT: Final = "json_object True, or one of json_schema, regex and lark as text, a schema as a mapping too"
OF_MESSAGES: Final = "messages as the prompt, since it belongs to the chat template"
_MESSAGES: Final = (pb.Constraint, pb.Messages, pb.GenerateRequest, pb.SamplingParams)
"""An option is a field of one of them, by its name."""
_M = TypeVar("_M", bound=Message)


def generate_request(model: str, prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Return a request.

    Raises:
        RequestInvalid: an option's value does not fit its field; the findings name them all.
        TypeError: an option that does not exist.
    """
    explicit = explicit_options(options, GenerateOptions)
    explicit |= {
        name: [explicit[name]] for name in ("stop", "bad_words") if isinstance(explicit.get(name), str)
    }
    constraints, templated, fields, sampling = (_of(kind, explicit) for kind in _MESSAGES)
    fields["model"] = model
    adapters = fields.pop("adapters", ())
    findings = [*misfits(pb.GenerateRequest, fields), *misfits(pb.SamplingParams, sampling)]
    try:
        fields["adapters"] = adapters_of(adapters)
    except (ValueError, TypeError) as error:
        findings.append(misfit("adapters", ADAPTERS, str(error)))
    try:
        fields |= _prompt(prompt, templated)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        findings.append(misfit("prompt", PROMPTS, str(error)))
    else:
        alone = {} if "messages" in fields else templated
        findings += [misfit(name, OF_MESSAGES, repr(value)) for name, value in alone.items() if value]
    try:
        fields |= _constraint(constraints)
    except (ValueError, TypeError) as error:
        findings.append(misfit("constraint", CONSTRAINT, str(error)))
    if findings:
        raise RequestInvalid("the request cannot be sent", findings)
    return pb.GenerateRequest(**fields, sampling=pb.SamplingParams(**sampling))


def explicit_options(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the options of a TypedDict that are not left to the server; raise TypeError for unknown ones."""
    known = kind.__annotations__
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}")
    return {name: value for name, value in options.items() if value is not None}


def adapters_of(explicit: Any) -> list[pb.ScaledAdapter]:
    """Return adapters, by their names or with scales, as messages; raise TypeError or ValueError for others."""
    if isinstance(explicit, str):
        raise TypeError("text")
    parts = [(part, 1.0) if isinstance(part, str) else part for part in explicit]
    return [pb.ScaledAdapter(name=name, scale=scale) for name, scale in parts]


def _of(kind: type[Message], explicit: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in explicit.items() if name in kind.DESCRIPTOR.fields_by_name}


def _prompt(prompt: Prompt, templated: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(prompt, str):
        prompt.encode()  # half a character cannot be sent
        return {"text": prompt}
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        turns = [_turn(item) for item in cast(list[Turn], items)]
        tools = [_tool(tool) for tool in templated.get("tools", ())]
        fields = {name: value for name, value in templated.items() if name != "tools"}
        if variables := fields.pop("chat_template_kwargs", None):
            fields["chat_template_kwargs"] = _json(variables)
        return {"messages": pb.Messages(messages=turns, tools=tools, **fields)}
    return {"token_ids": pb.TokenIds(ids=cast(list[int], items))}


def _turn(message: Mapping[str, Any]) -> pb.Message:
    """Return a turn, given in the shape of the OpenAI API."""
    return pb.Message(
        role=message["role"],
        content=message.get("content") or "",
        name=message.get("name"),
        tool_call_id=message.get("tool_call_id"),
        reasoning=message.get("reasoning") or message.get("reasoning_content"),
        tool_calls=[
            pb.ToolCall(
                id=call.get("id"),
                name=call["function"]["name"],
                arguments=_json(call["function"].get("arguments", {})),
            )
            for call in message.get("tool_calls") or ()
        ],
    )


def _tool(tool: Mapping[str, Any]) -> pb.Tool:
    function = tool["function"]
    parameters = function.get("parameters")
    return pb.Tool(
        name=function["name"],
        description=function.get("description"),
        parameters="" if parameters is None else _json(parameters),
    )


def _constraint(explicit: Mapping[str, Any]) -> dict[str, Any]:
    constraints = {name: value for name, value in explicit.items() if value is not False}
    if len(constraints) > 1:
        raise ValueError(" and ".join(constraints))
    for name, value in constraints.items():
        if name == "json_object":
            return {"constraint": pb.Constraint(json_object=pb.JsonObject())}
        if name != "json_schema" and not isinstance(value, str):
            raise TypeError(f"{name} {value!r}")
        text: Any = _json(value)
        return {"constraint": pb.Constraint(**{name: text})}
    return {}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


EXCERPT: Final = 80
"""Characters of a value that a finding shows."""
_WHOLE: Final = "a whole number from {} to {}"
_EXPECTED: Final = {
    FieldDescriptor.TYPE_BOOL: "True or False",
    FieldDescriptor.TYPE_FLOAT: "a number",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_STRING: "text",
    FieldDescriptor.TYPE_INT32: _WHOLE.format(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: _WHOLE.format(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: _WHOLE.format(0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: _WHOLE.format(0, 2**64 - 1),
}


def fitted(kind: type[_M], findings: Sequence[Finding] = (), **fields: Any) -> _M:
    """Return a message of these fields; raise RequestInvalid for findings, and for values that do not fit."""
    if all_findings := [*findings, *misfits(kind, fields)]:
        raise RequestInvalid("the request cannot be sent", all_findings)
    return kind(**fields)


def misfits(kind: type[Message], fields: Mapping[str, Any]) -> list[Finding]:
    """Return a finding for each value that does not fit its field of a message."""
    found = []
    for name, value in fields.items():
        try:
            kind(**{name: value})
        except (ValueError, TypeError):
            found.append(misfit(name, _expected(kind, name), repr(value)))
    return found


def misfit(where: str, expected: str, found: str) -> Finding:
    """Return the finding of a value that does not fit."""
    return Finding(code="E_BAD_FIELD", where=where, expected=expected, found=found[:EXCERPT])


def _expected(kind: type[Message], name: str) -> str:
    """Return what a field takes, in a caller's words."""
    field = kind.DESCRIPTOR.fields_by_name[name]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (_EXPECTED.get(each.type, each.name) for each in field.message_type.fields)
        return f"a mapping, each key {key}, each value {value}"
    one = _EXPECTED.get(field.type, name)
    return f"a list, each {one}" if field.is_repeated else one
