from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import LEFTOVER_S, BuildContext
from builder_service.pipeline.progress import Progress, Stage
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import (
    BundleCorrupt,
    CheckpointInvalid,
    RevisionNotFound,
    SourceRefused,
)
from loramux_shared.sources.checkpoint import fetch_base
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base


class CountingStore(MemoryStore):
    """Remembers the keys that were put."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[str] = []

    def put(self, key: str, data: bytes | Path) -> None:
        """Store, and remember."""
        self.puts.append(key)
        super().put(key, data)


@pytest.fixture
def context(tmp_path):
    """A workshop with an empty store; LOCAL may read below tmp_path."""
    write_base(tmp_path / "base")
    return BuildContext(CountingStore(), open_sources(local_roots=[tmp_path]), tmp_path / "work")


def deployment(folder: Path, *adapters: str, **lora: Any) -> Deployment:
    """A deployment of adapters that lie below a folder."""
    local = {name: {"source": "LOCAL", "repo": str(folder / name)} for name in adapters}
    data = {
        "model_name": "tiny",
        "build": {
            "checkpoint_repository": {"source": "LOCAL", "repo": str(folder / "base")},
            "lora_adapters": local,
            "lora_configuration": lora,
        },
    }
    return parse_deployment(data).deployment


def run(required: Deployment, context: BuildContext) -> Any:
    """Build and return the result."""
    return build(required, context, Progress(required.build.lora_adapters))


def test_a_build_publishes_bundles_then_the_generation_then_the_pointer(tmp_path, context):
    """Weights and config come before their manifest, manifests before the generation, the pointer last."""
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "two", tensors(("o_proj", "up_proj"), rank=8), r=8, target_modules="all-linear")
    result = run(deployment(tmp_path, "one", "two"), context)
    assert not result.unchanged
    puts, generation = context.store.puts, result.generation
    for record in generation.adapters.values():
        names = [key.rpartition("/")[2] for key in puts if record.digest in key]
        assert names == ["model.lora_weights.npy", "model.lora_config.npy", "manifest.json"]
    assert all(key.startswith("bundles/") for key in puts[:6])
    assert puts[6].startswith("deployments/tiny/claims/00000001-")
    assert puts[7:] == ["deployments/tiny/generations/00000001.json", "deployments/tiny/current.json"]
    assert current_generation(context.store, "tiny") == generation
    assert sorted(generation.base.files) == ["config.json", "model.safetensors", "tokenizer.json"]
    manifest = read_manifest(context.store, generation.adapters["two"].digest)
    assert (manifest.ranks, manifest.modules, manifest.tensors_used) == ((8,), ("attn_dense", "mlp_gate"), 8)
    assert list((tmp_path / "work").iterdir()) == []


def test_the_same_build_again_uploads_nothing(tmp_path, context):
    """A build of unchanged content answers with the current generation and writes no object."""
    write_adapter(tmp_path / "one")
    first = run(deployment(tmp_path, "one"), context)
    context.store.puts.clear()
    second = run(deployment(tmp_path, "one"), context)
    assert second.unchanged
    assert second.generation == first.generation
    assert context.store.puts == []


def test_the_same_adapter_has_the_same_digest_from_anywhere(tmp_path, context):
    """The digest follows from the adapter's bytes and the settings, not from where the adapter was."""
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "deep" / "two")
    expected = deployment(tmp_path, "one", "two")
    moved = expected.build.lora_adapters["two"].model_copy(update={"repo": str(tmp_path / "deep" / "two")})
    adapters = {**expected.build.lora_adapters, "two": moved}
    expected = expected.model_copy(
        update={"build": expected.build.model_copy(update={"lora_adapters": adapters})}
    )
    records = run(expected, context).generation.adapters
    assert records["one"].digest == records["two"].digest
    assert records["one"].source != records["two"].source


@pytest.mark.parametrize(
    ("provided", "config", "expected"),
    [
        (None, {"torch_dtype": "float16"}, "float16"),
        (None, {"torch_dtype": None}, "bfloat16"),
        (None, {"torch_dtype": None, "dtype": "float32"}, "float32"),
        ("float32", {}, "float32"),
    ],
)
def test_storage_type(tmp_path, context, provided, config, expected):
    """Bundles have the type that was asked for, else the base's, else bfloat16."""
    write_base(tmp_path / "base", **config)
    write_adapter(tmp_path / "one")
    generation = run(deployment(tmp_path, "one", dtype=provided), context).generation
    assert (generation.lora_dtype, read_manifest(context.store, generation.adapters["one"].digest).dtype) == (
        expected,
        expected,
    )


def test_local_folders_need_a_root(tmp_path, context):
    """A folder outside the operator's roots is refused, also behind a link."""
    outside = write_adapter(tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(SourceRefused, match=r"adapter 'link': LOCAL .* not below a folder"):
        run(deployment(tmp_path, "link"), context)
    write_adapter(tmp_path / "one")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    (tmp_path / "one" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with pytest.raises(SourceRefused, match="not below a folder"):
        run(deployment(tmp_path, "one"), context)


def test_a_pinned_local_adapter_may_not_change(tmp_path, context):
    """A content digest as revision of a LOCAL repository holds it to that content."""
    write_adapter(tmp_path / "one")
    found = run(deployment(tmp_path, "one"), context).generation.adapters["one"].source
    data = deployment(tmp_path, "one").model_dump(mode="json")
    data["build"]["lora_adapters"]["one"]["revision"] = found.revision
    expected = parse_deployment(data).deployment
    assert run(expected, context).generation.adapters["one"].source == found
    write_adapter(tmp_path / "one", tensors(seed=1))
    with pytest.raises(RevisionNotFound, match="expected content"):
        run(expected, context)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_base_that_is_none(tmp_path, context, missing):
    """A base without config or weights is named before any adapter is fetched."""
    (tmp_path / "base" / missing).unlink()
    with pytest.raises(CheckpointInvalid, match=f"base checkpoint: .*expected {missing}"):
        run(deployment(tmp_path), context)


def test_progress_counts_bytes_to_their_total(tmp_path, context):
    """Each stage with a known size ends with as many bytes as it announced."""
    write_adapter(tmp_path / "one")
    expected, seen = deployment(tmp_path, "one"), []
    progress = Progress(["one"], lambda: seen.append(progress.adapters[0]))
    build(expected, context, progress)
    stages = list(dict.fromkeys(adapter.stage for adapter in seen))
    assert stages == [Stage.FETCHING, Stage.VALIDATING, Stage.CONVERTING, Stage.PUBLISHING, Stage.DONE]
    last = {adapter.stage: adapter for adapter in seen}
    for stage in (Stage.FETCHING, Stage.PUBLISHING):
        assert last[stage].bytes_done == last[stage].bytes_total > 0
    assert last[Stage.DONE].digest
    assert last[Stage.DONE].warnings[0].code == "W_BASE"


def test_old_work_folders_are_swept(tmp_path, context):
    """A folder of a killed builder is removed after a day, younger folders are not."""
    old, young = tmp_path / "work" / "loramux-build-a", tmp_path / "work" / "loramux-build-b"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, old.stat().st_mtime - LEFTOVER_S - 60))
    context.sweep()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [young.name]


def test_fetch_base_verifies_a_local_base_in_place(tmp_path, context):
    """A LOCAL base is served from where it is, and refused when a byte of it changed."""
    base = run(deployment(tmp_path), context).generation.base
    assert fetch_base(base, tmp_path / "cache", context.sources) == tmp_path / "base"
    (tmp_path / "base" / "tokenizer.json").write_text("{ }")
    with pytest.raises(BundleCorrupt, match=r"tokenizer\.json: expected sha256"):
        fetch_base(base, tmp_path / "cache", context.sources)
    assert (tmp_path / "base" / "tokenizer.json").exists()
