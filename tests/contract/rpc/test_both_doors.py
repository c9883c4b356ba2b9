"""What one door takes, the other takes too; what one refuses, both do."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.descriptor import FieldDescriptor

from inference_service.openai_api.schema import CompletionBody
from inference_service.rpc.servicer import SERVICE_NAME
from loramux.inference.v1 import inference_pb2 as pb
from loramux.requests import generate_request
from tests.fuzz.doors import CALL, Doors, open_doors
from tests.fuzz.numbers import NUMBERS

pytestmark = pytest.mark.asyncio(loop_scope="module")
USER = {"role": "user", "content": "x"}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    """Both doors of an inference service."""
    async with open_doors(tmp_path_factory.mktemp("doors")) as opened:
        yield opened


def tool(name: str) -> dict[str, Any]:
    """A tool of a name."""
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("messages", "tools", "taken"),
    [
        ([USER], [], True),
        ([{"role": "developer", "content": "x"}, USER], [], True),
        ([USER, ASKED, {"role": "tool", "content": "4", "tool_call_id": "c1"}], [tool("look")], True),
        ([{"role": "", "content": "x"}], [], False),
        ([USER, {"role": "boss", "content": "x"}], [], False),
        ([{"role": "tool", "content": "x"}], [], False),
        ([USER | {"tool_calls": [CALL]}], [], False),
        ([ASKED | {"tool_calls": [CALL | {"function": {"name": "", "arguments": "{}"}}]}], [], False),
        ([], [], False),
        ([USER], [tool("a b")], False),
        ([USER], [tool("")], False),
        ([USER], [tool("a\n")], False),
        ([USER], [tool("f")] * 129, False),
    ],
)
async def test_turns_and_tools(
    doors: Doors, messages: list[dict[str, Any]], tools: list[dict[str, Any]], taken: bool
) -> None:
    """Roles, calls, the ids of answers to calls, and names of functions have the same rules."""
    body = {"model": "base", "max_tokens": 1, "messages": messages, "tools": tools}
    told = await doors.post("/v1/chat/completions", json.dumps(body).encode())
    counted = await doors.post("/tokenize", json.dumps({"messages": messages, "tools": tools}).encode())
    empty = pb.GenerateRequest(model="base", messages=pb.Messages())
    request = generate_request("base", messages, {"tools": tools, "max_tokens": 1}) if messages else empty
    said = await doors.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString())
    assert (told, counted, said) == (("OK",) * 3 if taken else ("invalid_value",) * 2 + ("REQUEST_INVALID",))


@pytest.mark.parametrize(
    ("variables", "taken"),
    [
        ({"enable_thinking": False, "thinking_budget": 3, "documents": [{"text": "x"}]}, True),
        ({"messages": []}, False),
        ({"bos_token": "x"}, False),
        ({"add_generation_prompt": False}, False),
        ({"a b": 1}, False),
        ({"_x": 1}, False),
        ({f"a{n}": 1 for n in range(33)}, False),
        ({"a": "x" * 65536}, False),
    ],
)
async def test_variables_of_the_template(doors: Doors, variables: dict[str, Any], taken: bool) -> None:
    """Names that the template has otherwise, names that are none, and too much, are refused everywhere."""
    asked = {"messages": [USER], "chat_template_kwargs": variables}
    body = {"model": "base", "max_tokens": 1} | asked
    told = await doors.post("/v1/chat/completions", json.dumps(body).encode())
    counted = await doors.post("/tokenize", json.dumps(asked).encode())
    request = generate_request("base", [USER], {"chat_template_kwargs": variables, "max_tokens": 1})
    said = await doors.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString())
    assert (told, counted, said) == (("OK",) * 3 if taken else ("invalid_value",) * 2 + ("REQUEST_INVALID",))


MIXED: list[tuple[str, list[tuple[str, float | None]], bool]] = [
    ("all*0.5 + rs*-1.5", [("all", 0.5), ("rs", -1.5)], True),
    ("all+all*-1", [("all", None), ("all", -1.0)], True),
    ("rs*8", [("rs", 8.0)], True),
    ("rs*8.5", [("rs", 8.5)], False),
    ("rs*nan", [("rs", math.nan)], False),
    ("rs*inf+all", [("rs", math.inf), ("all", None)], False),
    ("base*0.5+all", [("base", 0.5), ("all", None)], False),
    ("+".join(["all"] * 9), [("all", 1.0)] * 9, False),
    ("all*0.5+", [("all", 0.5), ("", 1.0)], False),
]


@pytest.mark.parametrize(("model", "adapters", "taken"), MIXED)
async def test_mixtures(
    doors: Doors, model: str, adapters: list[tuple[str, float | None]], taken: bool
) -> None:
    """One model over HTTP, the same or a list over gRPC: the same adapters, scales and numbers of them."""
    told = await doors.post("/v1/completions", json.dumps({"model": model, "prompt": [5]}).encode())
    said = []
    for request in (pb.GenerateRequest(model=model), pb.GenerateRequest()):
        request.token_ids.ids.append(5)
        request.sampling.max_tokens = 1
        if not request.model:
            request.adapters.extend(pb.ScaledAdapter(name=name, scale=scale) for name, scale in adapters)
        said.append(await doors.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString()))
    assert (told, *said) == (("OK",) * 3 if taken else ("invalid_value",) + ("REQUEST_INVALID",) * 2)


async def test_who_is_in_a_mixture_is_told_by_name(doors: Doors) -> None:
    """A name that is not served is not found, and adapters beside another model are refused."""
    assert await doors.post("/v1/completions", b'{"model": "all*0.5+x", "prompt": "a"}') == "model_not_found"
    request = pb.GenerateRequest(model="rs", text="a", adapters=[pb.ScaledAdapter(name="all")])
    assert await doors.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString()) == "REQUEST_INVALID"
    request.model = "base"
    assert await doors.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString()) == "OK"


NAMES = [
    field.name
    for field in pb.SamplingParams.DESCRIPTOR.fields
    if field.name in CompletionBody.model_fields and field.message_type is None
]


@pytest.mark.parametrize("name", NAMES)
async def test_numbers(doors: Doors, name: str) -> None:
    """A field that both doors know has the same bounds, where both can say the number."""
    field = pb.SamplingParams.DESCRIPTOR.fields_by_name[name]
    if field.type in (FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_STRING):
        return
    valid = {"max_tokens": 2, "temperature": 1.0}
    for number in NUMBERS:
        if not math.isfinite(number) or (name == "seed" and number >= 2**63):  # JSON has no more
            continue
        value = [number] if field.is_repeated else number
        try:
            sampling = pb.SamplingParams(**valid | {name: value})
        except (ValueError, TypeError):
            continue
        if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
            value = getattr(sampling, name)  # as float32 has it
        if isinstance(value, float) and not math.isfinite(value):
            continue
        body = {"model": "base", "prompt": "x"} | valid | {name: value}
        told = await doors.post("/v1/completions", json.dumps(body).encode())
        request = pb.GenerateRequest(model="base", text="x", sampling=sampling)
        said = await doors.call(f"/{SERVICE_NAME}/Generate", request.SerializeToString())
        assert (told == "OK") == (said == "OK"), (number, told, said)
