"""The generated pages: complete, and true to what they are made from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import inference_pb2
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import IGNORED_KEYS
from loramux_shared.settings import BuilderSettings, InferenceSettings, variable
from scripts import api_doc, deployment_doc, settings_doc
from scripts.pages import type_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_api_page_has_every_rpc_field_and_value() -> None:
    """Whatever the protos have stands on the page, and no link leads nowhere."""
    page = api_doc.page()
    for module in (builder_pb2, inference_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert f"### {service.name}.{method.name}\n" in page
        for message in module.DESCRIPTOR.message_types_by_name.values():
            assert f".{message.name}\n" in page
            for field in message.fields:
                assert f"| `{field.name}` |" in page
        for enum in module.DESCRIPTOR.enum_types_by_name.values():
            assert all(f"| `{value.name}` | {value.number} |" in page for value in enum.values)
    headings = {re.sub(r"[^a-z0-9_-]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", page, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


def test_statuses_of_an_rpc_are_a_table() -> None:
    """Each status of a comment is a row, with its lines put together."""
    page = api_doc.page()
    [generate] = re.findall(r"### InferenceService\.Generate\n.*?(?=\n###)", page, re.S)
    assert "returns a stream of" in generate
    assert re.search(r"\| `INVALID_ARGUMENT` \| REQUEST_INVALID: .*PROMPT_TOO_LONG: .*\|", generate)


def test_every_key_of_a_file_is_explained() -> None:
    """Every field of the model has a meaning, and every ignored key is named."""
    page = deployment_doc.page()
    definitions = Deployment.model_json_schema()["$defs"]
    for name in ("Build", "Repository", "LoraConfiguration", "Runtime"):
        for key, field in definitions[name]["properties"].items():
            assert field.get("description"), f"{name}.{key}"
            assert f"| `{key}` |" in page
    assert all(f"`{key}`" in page for keys in IGNORED_KEYS.values() for key in keys)


def test_every_setting_is_explained() -> None:
    """Every variable stands there with a meaning."""
    page = settings_doc.page()
    for kind in (BuilderSettings, InferenceSettings):
        for name, field in kind.model_fields.items():
            assert field.description, name
            assert f"| `{variable(name)}` |" in page


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "integer, at least `1`"),
        ({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}, "number, above `0`"),
        ({"enum": ["a", "b"]}, "`a`, `b`"),
        ({"type": "array", "items": {"type": "string"}}, "list of string"),
        ({"$ref": "#/$defs/Build"}, "[Build](#build)"),
        ({"$ref": "#/$defs/Kind"}, "`x`"),
    ],
)
def test_types_in_words(schema: dict[str, Any], words: str) -> None:
    """A type is told as people say it."""
    assert type_of(schema, {"Build": {"type": "object"}, "Kind": {"enum": ["x"]}}) == words


def accepts(schema: Any, value: Any, root: Any) -> bool:
    """Judge a value by the parts of JSON schema that tell known keys from unknown ones."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "if" in schema:
        return accepts(schema["then" if schema["if"]["required"][0] in value else "else"], value, root)
    if "anyOf" in schema:
        return any(accepts(each, value, root) for each in schema["anyOf"])
    if not isinstance(value, dict) or schema.get("type") != "object":
        return schema.get("type") != "object"
    known = schema.get("properties", {})
    patterns = list(schema.get("patternProperties", {}).values())
    strict = schema.get("additionalProperties") is False
    return set(schema.get("required", ())) <= set(value) and all(
        accepts(known[key], item, root)
        if key in known
        else accepts(patterns[0], item, root)
        if patterns
        else not strict
        for key, item in value.items()
    )


def test_the_schema_takes_what_the_program_takes() -> None:
    """The example in both forms, with ignored keys and the older spelling; an unknown key is refused."""
    schema = json.loads(deployment_doc.json_schema())
    wrapped = yaml.safe_load((ROOT / "examples/deployment.yaml").read_text())
    plain = {"model_name": wrapped["model_name"], **wrapped["trt_llm"]}
    older = {"build": {**plain["build"], "max_lora_rank": 16, "plugin_configuration": {}}, "resources": {}}
    for file in (wrapped, plain, older):
        assert accepts(schema, file, schema)
    assert not accepts(schema, {**plain, "builds": {}}, schema)
    assert not accepts(schema, {**plain, "build": {**plain["build"], "lora_adapter": {}}}, schema)
    assert not accepts(schema, {"trt_llm": {"runtime": {}}}, schema)
