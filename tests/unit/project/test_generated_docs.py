"""The generated pages are complete, and agree with their sources."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import loramux
from loramux import Client
from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import adapters_pb2, inference_pb2
from loramux_shared.bases.families import load_families
from loramux_shared.bases.formats.read import FORMATS
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import IGNORED_KEYS, UNSERVED_KEYS
from loramux_shared.faults import FAULTS
from loramux_shared.settings import BuilderSettings, InferenceSettings, variable
from scripts import api_doc, client_doc, deployment_doc, models_doc, settings_doc
from scripts.pages import type_of
from tests.support.root import ROOT


def test_the_api_page_has_every_rpc_field_and_value() -> None:
    """The page has every rpc, field and value of the protos, and no link leads nowhere."""
    page = api_doc.page()
    for module in (builder_pb2, inference_pb2, adapters_pb2):
        methods = [each for service in module.DESCRIPTOR.services_by_name.values() for each in service.methods]
        ends = {kind.name for each in methods for kind in (each.input_type, each.output_type)}
        for method in methods:
            assert f"### {method.containing_service.name}.{method.name}\n" in page
        for message in module.DESCRIPTOR.message_types_by_name.values():
            assert (f".{message.name}\n" in page) != (message.name in ends)
            for field in message.fields:
                assert f"`{field.name}` " in page
        for enum in module.DESCRIPTOR.enum_types_by_name.values():
            assert all(f"`{value.name}`" in page for value in enum.values)
    headings = {re.sub(r"[^a-z0-9_-]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", page, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


def test_a_method_has_its_fields_and_its_failures() -> None:
    """A section has a method's fields and streams, and names each reason of the comment once."""
    [generate] = re.findall(r"### InferenceService\.Generate\n.*?(?=\n###)", api_doc.page(), re.S)
    assert "\nTakes\n\n- `model` string: " in generate
    assert "\nStreams\n" in generate
    [fails] = re.findall(r"^Fails with (.*)\.$", generate, re.M)
    reasons = fails.split(", ")
    assert reasons[:3] == ["MODEL_NOT_FOUND", "REQUEST_INVALID", "PROMPT_TOO_LONG"]
    assert set(reasons) <= FAULTS.keys()
    assert len(reasons) == len(set(reasons))


def test_every_key_of_a_file_is_explained() -> None:
    """Every field of the model has a meaning."""
    page = deployment_doc.page()
    definitions = Deployment.model_json_schema()["$defs"]
    for name in ("Build", "Repository", "LoraConfiguration", "Runtime"):
        for key, field in definitions[name]["properties"].items():
            assert field.get("description"), f"{name}.{key}"
            assert re.search(rf"^- `{key}`( \(.*\))?: ", page, re.M), key


def test_every_key_of_hosted_engine_builders_has_its_line() -> None:
    """The page for users of Baseten names each ignored key, and the setting to use instead."""
    page = (ROOT / "docs/move/baseten.md").read_text()
    for block, keys in IGNORED_KEYS.items():
        assert all(f"`{key}`" in page or f"`trt_llm.{block}.{key}`" in page for key in keys), block
    for key, (_, fix) in UNSERVED_KEYS.items():
        assert f"| `trt_llm.{key}` | {fix.removesuffix('.')} |" in page


def test_every_public_method_of_the_client_is_documented() -> None:
    """Each stands on the page with its signature and a docstring; so does every record."""
    page = client_doc.page()
    methods = {name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_")}
    for name in methods:
        assert re.search(rf"^- `{name}\(.*\).*`: \w+", page, re.M), name
        assert inspect.isfunction(getattr(loramux.AsyncClient, name))
    for name in loramux.__all__:
        if inspect.isclass(getattr(loramux, name)) and name not in {"Client", "AsyncClient"}:
            assert f"### {name}\n" in page


def test_every_setting_is_explained() -> None:
    """The page explains every variable."""
    page = settings_doc.page()
    for kind in (BuilderSettings, InferenceSettings):
        for name, field in kind.model_fields.items():
            assert field.description, name
            assert re.search(rf"^- `{variable(name)}`( \(.*\))?: \w", page, re.M), name


def test_every_architecture_has_its_line_and_its_modules() -> None:
    """Each stands once among the families, and is small enough for its modules to be reported."""
    families, modules = models_doc.families(), models_doc.modules()
    for name, (architecture, family) in load_families().items():
        [line] = [each for each in families.splitlines() if f"`{name}`" in each]
        assert line.startswith(f"- {family.models}: ")
        assert models_doc.small(architecture).architecture == name
    assert "`self_attn.q_proj`" in modules
    assert all(f"`{method}`" in models_doc.formats() for each in FORMATS for method in each.methods)
    assert "- `Phi3ForCausalLM`: also `self_attn.qkv_proj`, `mlp.gate_up_proj`\n" in modules


def test_counted_answers_are_added_up_by_backend() -> None:
    """Each backend has a sum, and each architecture with an inexact answer has a line."""
    page = models_doc.parity()
    for words in models_doc.BACKENDS.values():
        [(exact, tried)] = re.findall(rf"{words} (\d+) of (\d+)", page.splitlines()[0])
        assert 0 < int(exact) <= int(tried)
        assert (f", {words}: " in page) == (exact != tried)


def test_what_stands_around_a_table_stays() -> None:
    """A page without the marks is not written at all."""
    page = "before\n<!-- a: `make docs` -->\nold\n<!-- end of a -->\nafter\n"
    assert models_doc.replaced(page, "a", "new\n") == page.replace("old", "new")
    for broken in (page.replace("end of a", "end of b"), page.replace("a: `", "b: `")):
        with pytest.raises(ValueError, match=r"docs/reference/models\.md: expected <!-- a"):
            models_doc.replaced(broken, "a", "new\n")


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
    """A type is reported as people say it."""
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


ELSEWHERE = {"1_Pooling/config.json", "claims/", "resolved/", "lora_adapter/", "native/", "tests/artifacts/"}
"""Folders of a store, of the cache, and of what tests leave."""
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "decisions"),
    *sorted((ROOT / "extensions").glob("*/README.md")),
)
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
ROOMS = ("", "inference_service", "builder_service", "shared/loramux_shared", "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page: Path) -> None:
    """Folders and modules in backquotes, and files behind links, exist; a room may be left out of a path.

    Pages of extensions may be gone with their folder.
    """
    text = page.read_text()
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text)) - ELSEWHERE
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    rooms = [*map(ROOT.joinpath, ROOMS), page.parent]
    lost = [path for path in named if not any((room / path).exists() for room in rooms)]
    lost += [path for path in linked if not (page.parent / path).exists()]
    gone = not (ROOT / "extensions").exists()
    assert not [path for path in lost if not (gone and "extensions/" in path)]


@pytest.mark.parametrize("note", DECISIONS, ids=lambda note: note.name)
def test_a_module_that_a_note_names_is_there(note: Path) -> None:
    """Modules in backquotes exist, by their path in the repository or in a room."""
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", note.read_text()))
    gone = not (ROOT / "extensions").exists()
    lost = {path for path in named if not any((ROOT / room / path).exists() for room in ROOMS)}
    assert not {path for path in lost if not (gone and "extensions/" in path)}


def _anchors(page: Path) -> set[str]:
    """Return the names that a link to a place of this page can have."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    named: Counter[str] = Counter()
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{named[slug]}" if named[slug] else slug)
        named[slug] += 1
    return found


@pytest.mark.parametrize("page", [*PAGES, *DECISIONS], ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_link_points_into_is_there(page: Path) -> None:
    """A link to a place of a page names a heading, or an anchor, that the page has."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", text)
    pages = [(page.parent / path if path else page, anchor) for path, anchor in links]
    assert not [(to.name, anchor) for to, anchor in pages if to.exists() and anchor not in _anchors(to)]


def test_every_page_is_two_clicks_from_the_index() -> None:
    """Every page but decision notes is linked from the index or from a page that the index links."""
    seen = {ROOT / "docs/index.md"}
    for _ in range(2):
        for page in list(seen):
            linked = re.findall(r"\]\((?!\w+:)([^)#\s]+\.md)", page.read_text())
            seen |= {to for link in linked if (to := (page.parent / link).resolve()).exists()}
    assert {page for page in PAGES if (ROOT / "docs") in page.parents} <= seen


@pytest.mark.parametrize("note", DECISIONS, ids=lambda note: note.name)
def test_a_decision_note_is_short(note: Path) -> None:
    """A note keeps the finding, in 40 lines at most."""
    assert len(note.read_text().splitlines()) <= 40


def test_nothing_of_a_merge_is_left() -> None:
    """No file has a conflict marker (ruff checks Python alone)."""
    pages = [*PAGES, *DECISIONS]
    assert not [page.name for page in pages if re.search(r"^[<>|]{7} ", page.read_text(), re.MULTILINE)]
