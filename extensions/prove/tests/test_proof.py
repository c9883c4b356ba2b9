"""Proofs: an adapter answers as its own files say, or the replica does not become ready."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.startup.load import Ready
from loramux_prove import building
from loramux_prove.__main__ import prove
from loramux_prove.fingerprint import difference
from loramux_shared.bundle.deployments import current_generation, publish_generation
from loramux_shared.bundle.manifest import (
    MANIFEST_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    FileDigest,
    Manifest,
    bundle_key,
    sha256_hex,
)
from loramux_shared.bundle.npy import NUMPY_TYPES
from loramux_shared.bundle.proof import Effect
from loramux_shared.bundle.reader import read_bundle, read_manifest
from loramux_shared.deployment import Deployment
from loramux_shared.faults import BuildInterrupted, CheckpointInvalid, ProofFailed, SettingsInvalid
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.proving import proved_here
from tests.support.stores.killed import copy_store
from tests.support.tiny import ADAPTERS, SIZES, World, make_world_of, refusal

Change = Callable[[Any, Manifest], None]
"""Changes the rows [R, C] of a bundle in place."""


BIASES: dict[str, Any] = {"r": 2, "lora_alpha": 3, "lora_bias": True, "bias": "all"}
AFFINE: dict[str, dict[str, Any]] = {
    "dora": {"r": 9, "lora_alpha": 9, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "biases": BIASES | {"target_modules": ["up_proj", "k_proj"]},
}
SCALE = "base_model.model.model.layers.1.self_attn.v_proj.ia3_l.default"
EVERY = (*ADAPTERS, *AFFINE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = LlamaConfig(**SIZES, attention_bias=True)
    return make_world_of(tmp_path_factory.mktemp("tiny"), config, ADAPTERS | AFFINE)


def proved(deployment: Deployment) -> Deployment:
    return deployment.model_copy(update={"build": deployment.build.model_copy(update={"prove": True})})


def build_into(store: MemoryStore, world: World, **lora: Any) -> None:
    deployment = proved(world.deployment(**lora))
    context = BuildContext(store, open_sources(local_roots=[world.root]))
    with proved_here():
        build(deployment, context, Progress(deployment.build.lora_adapters))


@pytest.fixture(scope="module")
def float32(world: World) -> MemoryStore:
    """A store with bundles in float32; as of every builder, the reference runs in a process of its own."""
    store, deployment = MemoryStore(), proved(world.deployment())
    context = BuildContext(store, open_sources(local_roots=[world.root]))
    build(deployment, context, Progress(deployment.build.lora_adapters))
    return store


@pytest.fixture(scope="module")
def bfloat16(world: World) -> MemoryStore:
    store = MemoryStore()
    build_into(store, world, dtype="bfloat16")
    return store


def manifest_of(store: MemoryStore, name: str) -> Manifest:
    """The manifest of an adapter of the current generation."""
    generation = current_generation(store, "tiny")
    return read_manifest(store, generation.adapters[name].digest)


def published(store: MemoryStore, name: str, manifest: Manifest, files: Mapping[str, bytes]) -> None:
    """Put a bundle into a store, and serve it under a name."""
    digest, generation = sha256_hex(manifest.to_bytes()), current_generation(store, "tiny")
    for file, data in (files | {MANIFEST_FILE: manifest.to_bytes()}).items():
        store.put(bundle_key(digest, file), data)
    record = generation.adapters[name].model_copy(update={"digest": digest})
    publish_generation(store, generation.model_copy(update={"adapters": generation.adapters | {name: record}}))


def files_of(store: MemoryStore, name: str) -> dict[str, bytes]:
    """The files of an adapter of the current generation, without the manifest."""
    digest = current_generation(store, "tiny").adapters[name].digest
    return {file: store.get(bundle_key(digest, file)) for file in manifest_of(store, name).files}


def tampered(store: MemoryStore, name: str, change: Change, file: str = WEIGHTS_FILE) -> MemoryStore:
    """A store with a changed bundle, its digests made right and its proof old; a vocabulary is one row."""
    other = copy_store(store)
    old = current_generation(other, "tiny").adapters[name].digest
    bundle = read_bundle(other, old)
    data = bytearray(other.get(bundle_key(old, file)))
    manifest, kind = bundle.manifest, NUMPY_TYPES[bundle.manifest.dtype]
    count, width = len(manifest.layer_rows), manifest.row_width
    if file == VOCABULARY_FILE:
        rows, tables = manifest.vocabulary_rows, manifest.replaced
        count, width = 1, sum(row.elements for row in rows) + sum(each.elements for each in tables)
    size = count * width * kind.itemsize
    change(np.frombuffer(data, kind, offset=len(data) - size).reshape(count, -1), manifest)
    digest = FileDigest(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = manifest.model_copy(update={"files": manifest.files | {file: digest}})
    published(other, name, manifest, files_of(store, name) | {file: bytes(data)})
    assert read_bundle(other, sha256_hex(manifest.to_bytes())).manifest == manifest
    return other


def b_of(rows: Any, manifest: Manifest, index: int) -> Any:
    row = manifest.rows[index]
    return rows[index, row.rank * row.in_features : row.rank * (row.in_features + row.out_features)]


def scale(index: int, factor: float) -> Change:
    """Multiply B of a row."""

    def change(rows: Any, manifest: Manifest) -> None:
        b_of(rows, manifest, index)[:] = (b_of(rows, manifest, index).astype(np.float32) * factor).astype(
            rows.dtype
        )

    return change


def swap(first: int, second: int) -> Change:
    """Exchange two rows of the same shape."""

    def change(rows: Any, manifest: Manifest) -> None:
        one, other = manifest.rows[first], manifest.rows[second]
        assert (one.rank, one.in_features) == (other.rank, other.in_features)
        assert one.out_features == other.out_features
        rows[[first, second]] = rows[[second, first]]

    return change


def multiplied(index: int, factor: float) -> Change:
    """Multiply the vectors of a row."""

    def change(rows: Any, manifest: Manifest) -> None:
        row = manifest.rows[index]
        first = row.elements - row.vectors * row.out_features
        rows[index, first : row.elements] *= rows.dtype.type(factor)

    return change


def test_what_changes_nothing_has_no_effect(world: World, tmp_path: Path) -> None:
    """A module whose scales are all 1 has no row in a bundle, and so none in a proof; others have theirs."""
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), config)
    with torch.no_grad():
        model.get_parameter(SCALE).mul_(1.5)
    model.save_pretrained(tmp_path)
    found = prove(world.base, {"it": {"folder": str(tmp_path)}})["it"]
    assert [(layer, module) for layer, module, _ in found["effects"]] == [(1, "attn_v")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_honest_bundle_is_served_in_every_type(
    world: World, float32: MemoryStore, bfloat16: MemoryStore, dtype: str
) -> None:
    """The errors of rounding in the store and in the replica are within the tolerance."""
    for store in (float32, bfloat16):
        ready = world.load(store, dtype=dtype)
        assert [refusal(ready, name) for name in EVERY] == [None] * len(EVERY)


def refused(ready: Ready, text: dict[str, str]) -> None:
    """Adapters are not served, for their proofs, and all others are."""
    for name in EVERY:
        fault = refusal(ready, name)
        if name in text:
            assert isinstance(fault, ProofFailed)
            assert text[name] in fault.message
        else:
            assert fault is None


ROWS = {"wide": 4, "all": 14, "rs": 4}
"""Rows of each adapter: modules are in the order of their ids, layer by layer."""


@pytest.mark.parametrize(
    ("index", "factor"),
    [
        pytest.param(index, factor, marks=() if (index + (factor > 0)) % 2 else pytest.mark.sweep)
        for index in range(max(ROWS.values()))
        for factor in (0.0, 2.0)
    ],
)
def test_a_single_row_that_is_zeroed_or_doubled_is_caught_in_bfloat16(
    world: World, bfloat16: MemoryStore, index: int, factor: float
) -> None:
    """An adapter with any one row changed is refused in the coarsest type, and the row is named."""
    store, stated = bfloat16, {}
    for name, count in ROWS.items():
        if index < count:
            row = manifest_of(bfloat16, name).rows[index]
            stated[name] = f"layer {row.layer} {row.module} adds something else"
            store = tampered(store, name, scale(index, factor))
    refused(world.load(store, dtype="bfloat16"), stated)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {
            "wide": swap(0, 2),  # q of the two layers
            "all": swap(1, 2),  # k and v of one layer
            "rs": swap(0, 2),
            "dora": multiplied(0, 1.5),
            "biases": multiplied(-1, -1.0),
        },
        {"wide": swap(1, 3), "all": swap(8, 9)},  # v of the two layers, k and v of the other
        {"wide": scale(0, 0.4), "all": scale(3, -1.0)},
    ],
)
def test_rows_that_are_exchanged_or_turned_are_caught(
    world: World, bfloat16: MemoryStore, changes: dict[str, Change], dtype: str
) -> None:
    """Rows in each other's place, a sign, a wrong scale: digests are right, answers are not."""
    store = bfloat16
    for name, change in changes.items():
        store = tampered(store, name, change)
    refused(world.load(store, dtype=dtype), dict.fromkeys(changes, "proof"))


def test_float32_sees_a_percent(world: World, float32: MemoryStore) -> None:
    """A scale that is off by one percent is caught where both sides are in float32."""
    assert refusal(world.load(tampered(float32, "rs", scale(1, 1.0))), "rs") is None
    refused(world.load(tampered(float32, "rs", scale(1, 1.01))), {"rs": "proof"})


def test_another_base_under_the_same_adapter_is_caught(
    world: World, float32: MemoryStore, tmp_path: Path
) -> None:
    """The log probabilities are about base and adapter together."""
    other = World(tmp_path / "base", world.adapters, tmp_path)
    other.base.mkdir()
    for path in world.base.iterdir():
        (other.base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(world.base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    save_file(tensors, other.base / "model.safetensors")
    store = MemoryStore()
    context = BuildContext(store, open_sources(local_roots=[world.root, tmp_path]))
    deployment = proved(other.deployment())
    with proved_here():
        build(deployment, context, Progress(deployment.build.lora_adapters))
    digests = {name: manifest_of(store, name).proof for name in EVERY}
    for name in EVERY:
        manifest = manifest_of(float32, name)
        assert manifest.proof != digests[name]
        published(store, name, manifest, files_of(float32, name))
    ready = other.load(store, local_roots=(world.root, tmp_path))
    refused(ready, dict.fromkeys(EVERY, "log probabilities differ"))


def test_an_imported_adapter_is_proved_from_its_npy_files(
    world: World, float32: MemoryStore, tmp_path: Path
) -> None:
    """The reference reads the files of another converter itself, and finds the same effects."""
    manifest = manifest_of(float32, "all")
    digest = sha256_hex(manifest.to_bytes())
    for name in manifest.files:
        (tmp_path / name).write_bytes(float32.get(bundle_key(digest, name)))
    again = prove(world.base, {"all": {"folder": str(tmp_path)}})["all"]
    found = {(layer, module): Effect(**effect) for layer, module, effect in again["effects"]}
    for row, expected in zip(manifest.rows, manifest.proof.effects, strict=True):
        assert difference(found[row.layer, row.module], expected) < 1e-5


def test_a_manifest_whose_proof_is_about_other_rows_is_refused(world: World, float32: MemoryStore) -> None:
    """A proof with too few effects is no proof of this bundle."""
    store = tampered(float32, "wide", scale(0, 1.0))
    manifest = manifest_of(store, "wide")
    short = manifest.proof.model_copy(update={"effects": manifest.proof.effects[:-1]})
    published(store, "wide", manifest.model_copy(update={"proof": short}), files_of(store, "wide"))
    refused(world.load(store), {"wide": "another bundle"})


def test_the_prover_is_a_process_that_speaks_json(world: World) -> None:
    """A base that cannot be served is an answer with a reason, not a crash."""
    request = {"base": str(world.root), "adapters": {}}
    done = subprocess.run(
        [sys.executable, "-m", "loramux_prove"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["fault"]["reason"] == CheckpointInvalid.reason


def test_a_builder_without_torch_says_what_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with proofs fails before anything is fetched, and names the extra."""
    monkeypatch.setattr(building, "NEEDS", ("no_such_torch",))
    with pytest.raises(SettingsInvalid, match=r"pip install 'loramux\[inference\]'"):
        build_into(MemoryStore(), world)


def test_a_build_that_is_stopped_stops_the_reference(world: World) -> None:
    """The process does not outlive the build that asked for it."""
    deployment = proved(world.deployment())
    progress: Progress

    def changed() -> None:
        if any(adapter.stage == "PROVING" for adapter in progress.adapters):
            progress.stop()

    progress = Progress(deployment.build.lora_adapters, changed)
    context = BuildContext(MemoryStore(), open_sources(local_roots=[world.root]))
    with pytest.raises(BuildInterrupted):
        build(deployment, context, progress)
