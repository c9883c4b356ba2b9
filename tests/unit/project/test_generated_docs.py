"""Pages of docs/ are those that their generators write, and their figures are those of the code."""

import json
import re
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import yaml

from loramux.builder.v1 import builder_pb2
from loramux.inference.v1 import adapters_pb2, inference_pb2
from loramux_shared.deployment_file import IGNORED_KEYS, UNSERVED_KEYS
from scripts import api_doc, deployment_doc
from tests.support.cases import cases
from tests.support.root import PAGES, ROOT


def test_the_api_page_has_every_rpc_field_and_value() -> None:
    """The page of the API has every method, message, field and value of the protos."""
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


def test_every_key_of_a_file_is_explained() -> None:
    """The page of deployment files explains every key."""
    page = deployment_doc.page()
    definitions = deployment_doc.explained()["$defs"]
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


def test_the_schema_takes_what_the_program_takes() -> None:
    """The example in both forms, with ignored keys and the older spelling; an unknown key is refused."""
    accepts = jsonschema.Draft202012Validator(json.loads(deployment_doc.json_schema())).is_valid
    wrapped = yaml.safe_load((ROOT / "examples/deployment.yaml").read_text())
    plain = {"model_name": wrapped["model_name"], **wrapped["trt_llm"]}
    older = {"build": {**plain["build"], "max_lora_rank": 16, "plugin_configuration": {}}, "resources": {}}
    for file in (wrapped, plain, older):
        assert accepts(file)
    assert not accepts({**plain, "builds": {}})
    assert not accepts({**plain, "build": {**plain["build"], "lora_adapter": {}}})
    assert not accepts({"trt_llm": {"runtime": {}}})


ELSEWHERE = {
    "1_LogitScore/config.json",
    "1_Pooling/config.json",
    "1_SpladePooling/config.json",
    "build/fuzz/",
    "builders/",
    "claims/",
    "resolved/",
    "lora_adapter/",
    "native/",
    "tests/artifacts/",
}
"""Folders of a store, of the cache, and of what tests leave."""
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
ROOMS = ("", "inference_service", "builder_service", "shared/loramux_shared", "docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page: Path) -> None:
    """Folders, modules and linked files exist, except extensions' own; a room may be left out of a path."""
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
    """The anchor of every link between pages exists."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)#([^)\s]+)\)", text)
    pages = [(page.parent / path if path else page, anchor) for path, anchor in links]
    assert not [(to.name, anchor) for to, anchor in pages if to.exists() and anchor not in _anchors(to)]


def test_every_page_is_two_clicks_from_the_index() -> None:
    """Every page is linked from the index, or from a page that is."""
    seen = {ROOT / "docs/index.md"}
    for _ in range(2):
        for page in list(seen):
            linked = re.findall(r"\]\((?!\w+:)([^)#\s]+\.md)", page.read_text())
            seen |= {to for link in linked if (to := (page.parent / link).resolve()).exists()}
    assert {page for page in PAGES if (ROOT / "docs") in page.parents} <= seen


@pytest.mark.parametrize("note", DECISIONS, ids=lambda note: note.name)
def test_a_decision_note_is_short(note: Path) -> None:
    """A note has at most 300 words, the list of what was tried one finding a line, and no line is long."""
    text = note.read_text()
    assert note.name == "tried.md" or len(text.split()) <= 300
    assert max(map(len, text.splitlines())) <= 200


def test_decision_notes_are_few() -> None:
    """Notes are what a maintainer could still decide otherwise: at most thirty files."""
    assert len(DECISIONS) <= 30


CLAIMS = cases(__file__, "CLAIMS")


@pytest.mark.parametrize(
    ("page", "claim"), [(page, claim) for page, claims in CLAIMS.items() for claim in claims]
)
def test_a_figure_is_that_of_the_code(page: str, claim: str) -> None:
    """A page says the numbers that the code has."""
    text = " ".join((ROOT / page).read_text().split())
    assert claim in text, f"{page} says otherwise than: {claim}"


def test_figures_of_the_readme_are_those_of_performance() -> None:
    """Each number that the README gives as a reason stands in the table of the command beside it."""
    reasons = " ".join(
        (ROOT / "README.md").read_text().partition("## Why")[2].partition("Machines and")[0].split()
    )
    rows = {
        row.split("|")[1].strip(" `"): row
        for row in (ROOT / "docs/performance.md").read_text().splitlines()
        if "|" in row
    }
    for column, load in ((2, 1), (3, 8), (4, 32)):
        ours, peft = (
            rows[name].split("|")[column].partition(";")[0].strip()
            for name in ("loramux, adapters", "transformers + PEFT, adapters")
        )
        assert re.search(rf"{ours} (tokens a second )?for {peft} at (concurrency )?{load}\b", reasons), load
    assert f"after {int(re.findall(r'[0-9]+ ms', rows['push'])[0][:-3]) / 1000:.2f} s" in reasons
    assert f"{re.findall(r'[0-9.]+(?= x)', rows['registered'])[0]} times the step" in reasons
