import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loramux_shared.storage.local import LocalStore
from tests.support.adapters import HIDDEN, Tensors, key, tensors, write_adapter, write_base
from tests.support.folders import built, deployment_of, workshop
from tests.support.root import ROOT

PAGE = ROOT / "docs" / "reference" / "bundle-format.md"
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
    built(required, workshop(folder, LocalStore(folder / "store")))
    return folder / "store"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_bundle_can_be_read_by_the_page_alone(tmp_path, dtype):
    """Forty lines of numpy and json find the adapter's A and scaled B, whatever the storage type."""
    values = {
        name: np.round(np.asarray(value, np.float32), 1).astype(np.float16).astype(value.dtype)
        for name, value in tensors(("q_proj", "up_proj", "down_proj")).items()
    }
    write_adapter(tmp_path / "one", values, target_modules="all-linear")
    rows = read_deployment(published(tmp_path, dtype), "page")["one"]
    places = [(layer, module) for layer in (0, 1) for module in (1, 6, 7)]
    assert [(row["layer"], row["module_id"]) for row in rows] == places
    leaves = {1: "q_proj", 6: "down_proj", 7: "up_proj"}
    for row in rows:
        a, b = (values[key(row["layer"], leaves[row["module_id"]], side)].astype(np.float32) for side in "AB")
        np.testing.assert_array_equal(row["a"], a)
        np.testing.assert_array_equal(row["b"], 2 * b)


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
    block = PAGE.read_text().split("## Test vector")[1]
    body = [json.loads(text) for text in re.findall(r"^[^=\[\n]*(\[.*\])$", block, re.MULTILINE)]
    assert [body[:2], body[2]] == written
    norms = re.findall(r"_proj +([\d.]+), ([\d.]+), ([\d.]+)$", block, re.MULTILINE)
    assert [[row["norm_a"], row["norm_b"], row["norm_ba"]] for row in rows] == [[*map(float, n)] for n in norms]
