"""Each field of a request has one name: APIs, client, bounds, engine and documents agree on it."""

import json
import math
import re
from collections.abc import MutableSequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from inference_service.api.http.openai import chat_schema, schema
from inference_service.api.http.openai.chat_schema import ChatBody
from inference_service.api.http.openai.schema import CompletionBody
from inference_service.api.http.responses import items, schema as responses
from inference_service.api.http.responses.schema import ResponsesBody
from inference_service.api.http.wire.body import Body
from inference_service.api.requests.bounds import IDS, NUMBERS, TEXTS
from inference_service.api.rpc.mapping import request_from_message
from inference_service.core.request import PARTS, Request
from inference_service.core.sampling import KNOBS, SamplingParams
from loramux.inference.v1 import inference_pb2 as pb
from loramux.records import GenerateOptions
from loramux_shared.runtime import MAX_TEMPERATURE
from tests.support.cases import cases
from tests.support.root import ROOT

REQUIRED = PARTS.keys() - {"name", "content"} | {"model", "prompt", "id"}
BOUNDED = NUMBERS.keys() | TEXTS.keys() | IDS.keys()
UNBOUNDED, HTTP_ONLY, TRANSLATED = (
    {name for names in cases(__file__, table).values() for name in names}
    for table in ("UNBOUNDED", "HTTP_ONLY", "TRANSLATED")
)
"""Fields without a bound, of HTTP alone, and of gRPC under other names, each table by its reasons."""


def test_every_field_of_a_request_has_a_bound_or_is_known_to_need_none() -> None:
    """Every field of a request is in one of two lists: bounded, or without need of a bound."""
    assert BOUNDED | UNBOUNDED == REQUIRED
    assert not BOUNDED & UNBOUNDED
    assert {field.name for field in fields(SamplingParams)} <= REQUIRED


def test_every_knob_is_in_every_api() -> None:
    """Every field of sampling is a field of gRPC's and of OpenAI's requests."""
    knobs = KNOBS.keys() - {"usual_temperature", "bad_words_token_ids"}
    assert knobs <= set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    assert all(knobs <= body.model_fields.keys() for body in (ChatBody, CompletionBody))


def test_the_table_is_finite_where_a_number_is_no_length() -> None:
    """Lengths are bounded by the sequence; no other number is without an end."""
    assert {name for name, bound in NUMBERS.items() if bound.high == math.inf} == {
        "max_tokens", "min_tokens", "top_k", "truncate_prompt_tokens",
    }  # fmt: skip


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, ResponsesBody])
def test_http_fields_pass_by_name(body: type[Body]) -> None:
    """A field of an HTTP body that is not HTTP's own is a field of a request."""
    refused = {name for name, field in body.model_fields.items() if field.annotation is type(None)}
    assert body.model_fields.keys() - refused - HTTP_ONLY <= REQUIRED


SMALLEST: dict[str, dict[str, Any]] = cases(__file__, "SMALLEST")
KINDS = {
    name: kind for module in (chat_schema, schema, items, responses) for name, kind in vars(module).items()
}


@pytest.mark.parametrize("name", SMALLEST)
def test_null_is_not_set(name: str) -> None:
    """Every optional field may be null, which means absent."""
    kind, needed = KINDS[name], SMALLEST[name]
    nulls = {field.alias or name: None for name, field in kind.model_fields.items() if not field.is_required()}
    stated, unsaid = (kind.model_validate_json(json.dumps(body)) for body in (nulls | needed, needed))
    assert stated == unsaid


def _grpc_request(message: pb.GenerateRequest) -> Request:
    call: Any = SimpleNamespace(time_remaining=lambda: None, invocation_metadata=tuple)
    return request_from_message(message, call, 100)


def _set(message: Any, field: Any) -> None:
    """Give a field a value that is none of its defaults."""
    values = {field.CPPTYPE_STRING: "processed", field.CPPTYPE_BOOL: not field.has_presence}
    value = values.get(field.cpp_type, 2)
    if field.message_type is not None:
        getattr(message, field.name)[2] = 1.5
    elif isinstance(getattr(message, field.name), MutableSequence):
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


@pytest.mark.parametrize("part", ["", "sampling", "messages"])
def test_every_field_of_a_grpc_request_has_the_name_and_the_value_of_the_requests(part: str) -> None:
    """A field of a gRPC request changes the request's field of the same name."""
    plain = _grpc_request(pb.GenerateRequest(model="m", text="x"))
    for field in (getattr(pb.GenerateRequest(), part) if part else pb.GenerateRequest()).DESCRIPTOR.fields:
        if field.name in TRANSLATED | {"model"}:
            continue
        message = pb.GenerateRequest(model="m", text="x")
        if part == "messages":
            message.messages.messages.add(role="user", content="x")
        _set(getattr(message, part) if part else message, field)
        assert _grpc_request(message).value_of(field.name) != plain.value_of(field.name), field.name


def test_the_clients_options_are_the_fields_of_a_grpc_request() -> None:
    """The client has an option for every field of a gRPC request."""
    messages = (pb.GenerateRequest, pb.Messages, pb.SamplingParams)
    names = {field.name for message in messages for field in message.DESCRIPTOR.fields}
    options = names - TRANSLATED - {"model"} | set(pb.Constraint.DESCRIPTOR.fields_by_name)
    options |= {"tools", "adapters", "chat_template_kwargs"}
    assert set(GenerateOptions.__annotations__) == options


def test_documents_tell_the_bounds() -> None:
    """docs/reference/grpc.md, which is made of the proto file, has the ends of every number that has them."""
    sections = _section("InferenceService.Generate") + _section("inference.SamplingParams")
    rows = dict(re.findall(r"^- `(\w+)` (.*)$", sections, re.MULTILINE))
    for name, bound in NUMBERS.items():
        for end in (bound.low, bound.high) if name in rows and name != "seed" else ():
            reported = f"{end:g}" in rows[name] or not math.isfinite(end) or end in (0, -1, math.ulp(0.0))
            assert reported, (name, end, rows[name])
    for name, (most, longest) in TEXTS.items():
        assert f"{most}" in rows[name] or most == 1
        assert f"{longest}" in rows[name]


def _section(name: str) -> str:
    [_, section] = (ROOT / "docs/reference/grpc.md").read_text().split(f"### {name}\n")
    return section.partition("\n### ")[0]


def test_the_page_has_the_bound_of_the_temperature() -> None:
    """The chat page offers temperatures up to the bound."""
    page = (ROOT / "inference_service/api/http/page/index.html").read_text()
    [field] = re.findall(r'<input id="temperature"[^>]*>', page)
    assert 'min="0"' in field
    assert f'max="{MAX_TEMPERATURE:g}"' in field
