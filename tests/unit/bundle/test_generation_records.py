"""Records of generations and manifests, and the names of models in them."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from loramux_shared.bundle.generation import Generation, Recipe
from loramux_shared.bundle.manifest import AdapterSummary, Manifest, ModuleRow
from loramux_shared.bundle.names import OWN_NAME, ModelNames, bad_name
from loramux_shared.deployment import Dtype

OLD = (
    '{"adapters":{"one":{"digest":"' + "a" * 64 + '","source":{"repo":"org/one","revision":"r",'
    '"runtime_secret_name":"","source":"HF","subfolder":""}}},"base":{"files":{},"source":{"repo":"org/base",'
    '"revision":"","runtime_secret_name":"","source":"HF","subfolder":""}},"create_time":"2026-01-01T00:00:00Z",'
    '"deployment":"tiny","format_version":1,"lora_dtype":"bfloat16","lora_target_modules":[],"max_lora_rank":8,'
    '"max_seq_len":null,"merge":"auto","number":1,"request_default_max_tokens":null,"serve_base":true,'
    '"served_model_name":"tiny"}\n'
).encode()
SUMMARY = AdapterSummary(ranks=(4, 8), modules=("attn_q",), tensors_used=4, weights_bytes=96, bundle_bytes=200)


def test_a_generation_of_an_older_release_keeps_its_bytes() -> None:
    """An absent field is not in its canonical bytes: pointers hold their digests."""
    found = Generation.from_bytes(OLD, sha256=hashlib.sha256(OLD).hexdigest())
    assert found.to_bytes() == OLD
    assert (found.recipe, found.adapters["one"].summary, found.adapters["one"].converter) == (None, None, None)


def test_what_a_generation_says_is_read_back() -> None:
    """Summaries and recipe are in the bytes, and come back the same."""
    old = Generation.from_bytes(OLD)
    record = old.adapters["one"].model_copy(update={"listing": "b" * 64, "summary": SUMMARY})
    new = old.model_copy(update={"adapters": {"one": record}, "recipe": Recipe(truncate_to_rank=4)})
    assert Generation.from_bytes(new.to_bytes()) == new
    body = json.loads(new.to_bytes())
    assert body["adapters"]["one"]["summary"]["ranks"] == [4, 8]
    assert body["recipe"] == {"prove": False, "truncate_to_rank": 4}


def test_content_is_the_same_whatever_a_source_says_of_the_same_files() -> None:
    """A folder that was touched makes no new generation; another digest does."""
    one = Generation.from_bytes(OLD)
    record = one.adapters["one"]
    touched = one.model_copy(
        update={
            "adapters": {"one": record.model_copy(update={"listing": "b" * 64})},
            "number": 2,
            "create_time": datetime.now(UTC),
        }
    )
    assert touched.same_content(one)
    other = record.model_copy(update={"digest": "c" * 64})
    assert not one.model_copy(update={"adapters": {"one": other}}).same_content(one)


IN, OUT = 6, 10


def row(layer: int, rank: int, vectors: int = 0) -> ModuleRow:
    """A row of one module."""
    norms = {"norm_a": 1.0, "norm_b": 1.0, "norm_ba": 1.0}
    sizes = {"rank": rank, "in_features": IN, "out_features": OUT, "vectors": vectors}
    return ModuleRow(layer=layer, module_id=1, module="attn_q", scale=1.0, **norms, **sizes)


@pytest.mark.parametrize(
    ("rows", "tensors", "bytes_"),
    [
        ((row(0, 4),), 2, 2 * 4 * (IN + OUT)),
        ((row(0, 4), row(1, 2, vectors=2)), 6, 2 * (4 + 2) * (IN + OUT) + 2 * OUT * 4),
        ((row(0, 0, vectors=3),), 5, 2 * OUT * 4),
    ],
    ids=["pairs", "with vectors", "vectors alone"],
)
def test_tensors_and_bytes_of_rows(rows: tuple[ModuleRow, ...], tensors: int, bytes_: int) -> None:
    """A and B in the storage type, and c and d in float32, whatever a third vector repairs of c."""
    manifest = Manifest(dtype=Dtype.BFLOAT16, rows=rows, row_width=64, files={}, inputs={})
    assert (manifest.tensors_used, manifest.weights_bytes) == (tensors, bytes_)


def judged(*adapters: str, in_file: bool = False, **fields: Any) -> list[tuple[str, str]]:
    """Return the places where names of a deployment with base "base" and alias "al" do not fit, and the names
    found.
    """
    aliases = {"al": {"one": 1, "two": 0}}
    names = ModelNames(**{"base": "base", "adapters": adapters, "aliases": aliases} | fields)
    return [(finding.where, finding.found) for finding in names.findings(in_file=in_file)]


@pytest.mark.parametrize("name", ["al", "AL", "Base", "ONE"])
def test_each_model_has_a_name_of_its_own(name: str) -> None:
    """Names differ in more than case, aliases included."""
    owner = {"al": "alias al", "base": "the base base", "one": "adapter one"}[name.lower()]
    assert judged("one", name) == [(f"adapters.{name}", owner)]
    [finding] = ModelNames("base", ("one", name), {"al": {"one": 1}}).findings()
    assert finding.expected == OWN_NAME
    assert ModelNames("base", ("one",), {"al": {"one": 1}}).owner(name) == owner


def test_an_alias_has_a_model_that_answers() -> None:
    """An alias needs a served model with a weight; in a file, all its models must be of the deployment."""
    assert judged("one") == []
    assert judged("two") == [("runtime.aliases.al", "one: 1, two: 0")]
    assert judged("one", in_file=True) == [("runtime.aliases.al", "two")]
    to_base = {"aliases": {"al": {"base": 1}}}
    assert judged(**to_base) == []
    assert judged("one", serve_base=False, **to_base) == [("runtime.aliases.al", "base: 1")]


def test_something_is_served() -> None:
    """A deployment serves something, and a merged adapter is alone."""
    assert judged(serve_base=False, aliases={}) == [("adapters", "none")]
    found = "adapters: one, two; runtime.serve_base: false"
    assert judged("one", "two", serve_base=False, merge_always=True) == [("adapters", found)]


@pytest.mark.parametrize("name", ["", "a b", "a*2", ".a", "x" * 129, "a\n"])
def test_what_is_no_name(name: str) -> None:
    """The cure is the rule."""
    finding = bad_name(name, "here")
    assert finding.where == "here"
    assert "Begin with a letter" in finding.fix
    assert bad_name("a-b.c:d_1", "here") is None
