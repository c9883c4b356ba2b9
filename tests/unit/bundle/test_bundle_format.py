"""Files of bundles byte for byte, and the page of the format, which names the fields of the code."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loramux_shared.bundle.added_tokens import AddedToken, OwnTokens
from loramux_shared.bundle.generation import (
    AdapterRecord,
    BaseRecord,
    Current,
    Generation,
    Recipe,
    SpeculatorRecord,
)
from loramux_shared.bundle.manifest import (
    AdapterSummary,
    Coverage,
    FileDigest,
    Manifest,
    ModuleRow,
    Replaced,
    ScoreHead,
    Truncation,
)
from loramux_shared.bundle.npy import cast, read_config, weights_pieces, write_checked
from loramux_shared.bundle.proof import Effect, Probe, ProbeLogprob, Proof
from loramux_shared.deployment import Dtype, Model, ModelLimits, Repository, Resolve
from loramux_shared.faults import BundleCorrupt, Finding
from loramux_shared.runtime import Limits
from loramux_shared.storage.local import LocalStore
from tests.fuzz import bundles
from tests.support.adapters import HIDDEN, Tensors, key, tensors, write_adapter, write_base
from tests.support.cases import cases
from tests.support.folders import context_of, deployment_of, run_build
from tests.support.root import ROOT

PAGE = (ROOT / "docs" / "reference" / "bundle-format.md").read_text(encoding="utf-8")
MODULES = ("attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate")
NAMES = dict(enumerate(MODULES, 1))


def read_deployment(store: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Read a store by docs/reference/bundle-format.md with numpy, json and sha256: adapter name to rows."""
    current = json.loads((store / "deployments" / name / "current.json").read_bytes())
    path = store / "deployments" / name / "generations" / f"{current['generation']:08d}.json"
    generation = json.loads(checked(path, current["sha256"]))
    assert generation["format_version"] == 1
    return {
        adapter: read_bundle(store / "bundles" / "sha256" / record["digest"], record["digest"])
        for adapter, record in generation["adapters"].items()
    }


def checked(path: Path, sha256: str) -> bytes:
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256
    return data


def read_bundle(folder: Path, digest: str) -> list[dict[str, Any]]:
    """The rows of a bundle with A and sB, and c and d, in float32."""
    data = checked(folder / "manifest.json", digest)
    manifest = json.loads(data)
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert data == canonical.encode()
    assert manifest["format_version"] == 1 + any("vectors" in row for row in manifest["rows"])
    for file, record in manifest["files"].items():
        assert len(checked(folder / file, record["sha256"])) == record["size"]
    weights, config = (np.load(folder / f"model.lora_{kind}.npy") for kind in ("weights", "config"))
    descr = {"float16": "<f2", "float32": "<f4", "bfloat16": "|V2"}[manifest["dtype"]]
    assert weights.dtype == np.dtype(descr)
    assert weights.shape == (1, len(manifest["rows"]), manifest["row_width"])
    assert config.dtype == np.dtype("<i4")
    if manifest["dtype"] == "bfloat16":
        weights = (weights.view("<u2").astype("<u4") << 16).view("<f4")
    rows = []
    for row, values, columns in zip(manifest["rows"], weights[0], config[0], strict=True):
        stated = [row["module_id"], row["layer"], row["rank"], row.get("vectors", 0)]
        assert columns.tolist() == stated[: manifest["config_columns"]]
        assert NAMES[row["module_id"]] == row["module"]
        split = row["rank"] * row["in_features"]
        end = split + row["rank"] * row["out_features"]
        own = values[end : end + row.get("vectors", 0) * row["out_features"]].astype(np.float32)
        assert not values[end + len(own) :].any()
        c, d, rest = (*own.reshape(-1, row["out_features"]), None, None, None)[:3]
        a = values[:split].reshape(row["rank"], row["in_features"]).astype(np.float32)
        b = values[split:end].reshape(row["out_features"], row["rank"]).astype(np.float32)
        gram_a, gram_b = (wide.T @ wide for wide in (a.T.astype(np.float64), b.astype(np.float64)))
        norms = [np.trace(gram_a) ** 0.5, np.trace(gram_b) ** 0.5, (gram_a * gram_b).sum() ** 0.5]
        np.testing.assert_allclose([row["norm_a"], row["norm_b"], row["norm_ba"]], norms, rtol=1e-4)
        c = 1 if c is None else c + (0 if rest is None else rest)
        rows.append({**row, "a": a, "b": b, "c": c, "d": 0 if d is None else d})
    return rows


def published(folder: Path, dtype: str, weights: Tensors | None = None, **config: Any) -> Path:
    """Build the adapter of a folder into a store of files, on a base with weights; returns its folder."""
    write_base(folder / "base", **config)
    if weights:
        save_file(weights, folder / "base" / "model.safetensors")
    required = deployment_of(folder, "one", name="page", lora_configuration={"dtype": dtype})
    run_build(required, context_of(folder, LocalStore(folder / "store")))
    return folder / "store"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_vectors_can_be_read_by_the_page_alone(tmp_path, dtype):
    """Magnitudes over the norms of W + sBA, and biases; c is kept to more digits than the type has."""
    draw = np.random.default_rng(2)
    names = [f"model.layers.{layer}.self_attn.{leaf}" for layer in (0, 1) for leaf in ("q_proj", "v_proj")]
    values, weights = {name: np.asarray(value, "f4") for name, value in tensors().items()}, {}
    for name in names:
        out = len(values[f"base_model.model.{name}.lora_B.weight"])
        values[f"base_model.model.{name}.lora_magnitude_vector"] = draw.uniform(0.5, 2, out).astype("f4")
        values[f"base_model.model.{name}.base_layer.bias"] = draw.normal(size=out).astype("f4")
        weights |= {f"{name}.weight": draw.normal(size=(out, HIDDEN)).astype("f4")}
        weights |= {f"{name}.bias": draw.normal(size=out).astype("f4")}
    weights["model.layers.1.self_attn.k_proj.bias"] = draw.normal(size=HIDDEN // 2).astype("f4")
    values["base_model.model.model.layers.1.self_attn.k_proj.bias"] = np.ones(HIDDEN // 2, "f4")
    write_adapter(tmp_path / "one", values, target_modules=["q_proj", "v_proj"], use_dora=True, bias="all")
    rows = read_deployment(published(tmp_path, dtype, weights, attention_bias=True), "page")["one"]
    assert [(row["layer"], row["module_id"], row["rank"]) for row in rows] == [
        (0, 1, 4), (0, 3, 4), (1, 1, 4), (1, 2, 0), (1, 3, 4),
    ]  # fmt: skip
    precision = {"bfloat16": 2**-16, "float16": 2**-20, "float32": 2**-23}[dtype]
    for row, name in zip([row for row in rows if row["rank"]], names, strict=True):
        own = {side: values[f"base_model.model.{name}.lora_{side}.weight"].astype("f8") for side in "AB"}
        norms = np.linalg.norm(weights[f"{name}.weight"] + 2 * own["B"] @ own["A"], axis=1)
        c = values[f"base_model.model.{name}.lora_magnitude_vector"] / norms
        np.testing.assert_allclose(row["c"], c, rtol=precision)
        d = values[f"base_model.model.{name}.base_layer.bias"] - c * weights[f"{name}.bias"]
        np.testing.assert_allclose(row["d"], d, rtol=2**-8 if dtype == "bfloat16" else 1e-3)
    [alone] = [row for row in rows if not row["rank"]]
    np.testing.assert_allclose(alone["d"], 1 - weights["model.layers.1.self_attn.k_proj.bias"], rtol=2**-8)
    assert np.all(alone["c"] == 1)


def test_the_test_vector_of_the_page(tmp_path):
    """The builder writes the page's test vector, number by number."""
    vector = {
        ("q_proj", "A"): [[1, 2, 3, 4], [5, 6, 7, 8]],
        ("q_proj", "B"): [[1, 0], [0, 1], [1, 1], [2, -1]],
        ("v_proj", "A"): [[1, -1, 0.5, 0]],
        ("v_proj", "B"): [[0.25], [-0.5]],
    }
    write_adapter(tmp_path / "one", r=2, lora_alpha=4, rank_pattern={"v_proj": 1})
    save_file(
        {key(0, module, side): np.array(value, np.float16) for (module, side), value in vector.items()},
        tmp_path / "one" / "adapter_model.safetensors",
    )
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    store = published(tmp_path, "float16", **sizes)
    rows = read_deployment(store, "page")["one"]
    folder = next((store / "bundles" / "sha256").iterdir())
    written = [np.load(folder / f"model.lora_{kind}.npy")[0].tolist() for kind in ("weights", "config")]
    block = PAGE.split("## Test vector")[1]
    body = [json.loads(text) for text in re.findall(r"^[^=\[\n]*(\[.*\])$", block, re.MULTILINE)]
    assert [body[:2], body[2]] == written
    norms = re.findall(r"_proj +([\d.]+), ([\d.]+), ([\d.]+)$", block, re.MULTILINE)
    assert [[row["norm_a"], row["norm_b"], row["norm_ba"]] for row in rows] == [[*map(float, n)] for n in norms]


Q_A = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)
Q_B = np.array([[1, 0], [0, 1], [1, 1], [2, -1]], np.float32)
CONFIG = np.array([[1, 0, 2, 0], [3, 0, 1, 0]], np.int32)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_file_that_someone_else_writes_to_is_found(tmp_path):
    """A file with another size than the written one is refused: None."""

    def pieces():
        yield b"content"
        yield 5
        with (tmp_path / "f").open("ab") as file:
            file.write(b"more")

    assert write_checked(tmp_path / "f", pieces()) is None


@pytest.mark.parametrize(("value", "bits"), cases(__file__, "test_bfloat16_rounds_to_nearest_even"))
def test_bfloat16_rounds_to_nearest_even(value, bits):
    """float32 becomes the nearest bfloat16; of two equally near ones the even one."""
    source = np.array([value], np.uint32).view(np.float32)
    assert cast(source, Dtype.BFLOAT16).view(np.uint16).tolist() == [bits]


def test_rows_that_do_not_fit_are_an_error(tmp_path):
    """A row of another type or width, or a missing one, is an error of the writer."""
    row = (cast(Q_A, Dtype.FLOAT16), cast(Q_B, Dtype.FLOAT16))
    with pytest.raises(ValueError, match="16 elements"):
        write_checked(tmp_path / "w", weights_pieces(Dtype.FLOAT16, count=1, width=15, rows=[row]))
    with pytest.raises(ValueError, match="1 rows"):
        write_checked(tmp_path / "w", weights_pieces(Dtype.FLOAT16, count=2, width=16, rows=[row]))


HOSTILE = [
    b"", b"PK\x03\x04", saved(CONFIG[None])[:100], saved(CONFIG[None]) + b"\0", saved(CONFIG[None])[:-1],
    saved(CONFIG), saved(CONFIG[None].astype(">i4")), saved(np.asfortranarray(CONFIG[None])),
    saved(CONFIG[None].astype("<i8")), saved(np.zeros((1, 0, 4), np.int32)),
    b"\x93NUMPY\x03\x00" + saved(CONFIG[None])[8:], saved(np.array([[["x"]]], dtype=object)),
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_other_files_are_refused(data):
    """A file that is not exactly such an npy file is named corrupt, and nothing of it is used or unpickled."""
    with pytest.raises(BundleCorrupt, match="expected"):
        read_config(data, "config")


@pytest.mark.parametrize(
    ("field", "other", "expected"),
    [
        (b'"scale": 4.0', b'"scale": 1e999', "1 fields are missing or wrong"),
        (b'"scale": 4.0', b'"scale": NaN', "1 fields are missing or wrong"),
        (b'"model.lora_weights.npy"', b'"' + b"a" * 9999 + b'"', r"expected no file 'aaaa"),
        (b'"attn_q"', b'"' + b"a" * 9999 + b'"', r"module: expected attn_q, found aaaa"),
        (b'"in_features": 16', b'"in_features": 1' + b"0" * 4000, r"expected 2000000"),
    ],
    ids=["endless", "no number", "a file of a long name", "a module of a long name", "a long number"],
)
def test_a_manifest_that_lies_is_refused_in_few_words(field: bytes, other: bytes, expected: str) -> None:
    """Numbers that JSON does not have are no scales, and what a manifest says is not repeated at length."""
    bundle = bundles.seeds()[0]
    assert field in bundle
    with pytest.raises(BundleCorrupt, match=expected) as caught:
        bundles.judge(bundle.replace(field, other, 1))
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("seed", "field", "other", "expected"),
    [
        (0, '"format_version": 1', '"format_version": 2', "format_version: expected 1, found 2"),
        (1, '["a", "b"]', '["a"]', "expected a name for each label, found 1"),
        (1, '"hidden_size": 3', '"hidden_size": 4', r"shape: expected \(2, 4\), found \(2, 3\)"),
        (2, "[[1, 2], [5, 1]]", "[[1, 2], [3, 1]]", "embedding: expected ascending runs of tokens"),
    ],
    ids=["version", "labels", "score head", "tokens"],
)
def test_a_manifest_that_contradicts_itself_or_its_files_is_refused(
    seed: int, field: str, other: str, expected: str
) -> None:
    """A bundle is refused where parts of its manifest do not agree, or a file has another shape."""
    bundle = bundles.seeds()[seed]
    assert field.encode() in bundle
    with pytest.raises(BundleCorrupt, match=expected):
        bundles.judge(bundle.replace(field.encode(), other.encode(), 1))


def section(begin: str, end: str) -> str:
    return PAGE[PAGE.index(begin) : PAGE.index(end, PAGE.index(begin))]


def first_column(table: str) -> set[str]:
    """The names in the first column of a table, of which a cell may hold several."""
    rows = re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE)
    return {name for row in rows for name in row.split(", ")} - {"key"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Manifest, first_column(section("### `manifest.json`", "A manifest MUST hold"))),
        (ModuleRow, first_column(section("A row:", "**Coverage.**"))),
        (Generation, set(re.findall(r"`(\w+)`", section("`generations/<n>.json`:", "A `source` is")))),
        (Current, set(re.findall(r"`(\w+)`", section("`current.json`:", "## The npy files")))),
        (BaseRecord, set(re.findall(r"`base` \(`{([^}]*)}`\)", PAGE)[0].split(", "))),
        (Repository, set(re.findall(r"A `source` is `{([^}]*)}`", PAGE)[0].split(", "))),
    ],
)
def test_a_record_has_the_keys_that_the_page_names(record: type[Model], expected: set[str]) -> None:
    """A key that is written and not told, or told and not written, is a mistake of one of the two."""
    values = {"auto", "always", "never"}  # of merge
    assert expected - values == set(record.model_fields)


INSIDE = (
    AddedToken, AdapterRecord, AdapterSummary, BaseRecord, Coverage, Effect, FileDigest, Finding,
    Limits, ModelLimits, OwnTokens, Probe, Proof, Recipe, Replaced, Repository, ScoreHead, ProbeLogprob,
    SpeculatorRecord, Truncation, Resolve,
)  # fmt: skip


def test_the_records_inside_others_have_the_keys_that_the_page_names() -> None:
    """The page lists each nested record in braces, with all of its keys, and no other braces."""
    reported = {frozenset(keys.split(", ")) for keys in re.findall(r"`{(\w+(?:, \w+)+)}`", PAGE)}
    assert reported == {frozenset(record.model_fields) for record in INSIDE}
