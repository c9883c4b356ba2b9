"""Builds: their order, and what they fetch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import LEFTOVER_S, BuildContext, Ledger, Space
from builder_service.pipeline.fetch import FetchedAdapter, fetch_adapters
from builder_service.pipeline.progress import Progress, Stage
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Deployment, Repository, SourceKind
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import (
    BundleCorrupt,
    CheckpointInvalid,
    Fault,
    RepoGated,
    RepoNotFound,
    ResourcesExhausted,
    RevisionNotFound,
    SourceChanged,
    SourceRefused,
    SourceUnavailable,
)
from loramux_shared.sources.base import Progress as Counter, Resolved, SourceFile, unwatched
from loramux_shared.sources.checkpoint import fetch_base
from loramux_shared.sources.files import content_digest
from loramux_shared.sources.open import Sources, open_sources
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


FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 8}


class Archived(Resolved):
    """A listing that is in an archive of a thousand bytes, open until it is closed."""

    open = 0

    def close(self) -> None:
        """Stop counting the open file."""
        Archived.open -= 1


class FakeSource:
    """Repositories in memory; one whose address is a reason fails with it."""

    def __init__(self, faults: Mapping[str, Fault], sizes: Mapping[str, int] | None = None) -> None:
        self._faults = faults
        self._sizes = sizes or {name: len(data) for name, data in FILES.items()}

    def resolve(
        self, repository: Repository, progress: Counter = unwatched, room: Counter = unwatched
    ) -> Resolved:
        """List the same files for everyone."""
        room(1000)
        progress(0)
        if repository.label in self._faults:
            raise self._faults[repository.label]
        Archived.open += 1
        return Archived(repository, {name: SourceFile(size) for name, size in self._sizes.items()})

    def fetch(
        self, resolved: Resolved, names: Iterable[str], into: Path, progress: Counter = unwatched
    ) -> dict[str, FileDigest]:
        """Write nothing."""
        del into, progress
        return {name: FileDigest(size=resolved.files[name].size, sha256="0" * 64) for name in names}

    digests = place = None

    def pin(self, resolved: Resolved, files: Mapping[str, FileDigest]) -> Repository:
        """Return the repository with a digest."""
        return resolved.repository.model_copy(update={"revision": content_digest(files)})


def fetch(
    folder: Path, source: FakeSource, *names: str, max_bytes: int | None = None
) -> tuple[Progress, list[FetchedAdapter]]:
    """Fetch adapters whose addresses are their names."""
    adapters = {
        name: Repository(source=SourceKind.REMOTE_URL, repo=f"https://h/{name}?sig=canary") for name in names
    }
    progress = Progress(adapters)
    sources = Sources({SourceKind.REMOTE_URL: source})
    try:
        space = Space(folder, Ledger(), max_bytes)
        return progress, fetch_adapters(adapters, sources, space, folder, progress)
    except Fault as fault:
        fault.add_note(",".join(f"{item.name}={item.stage.value}" for item in progress.adapters))
        raise
    finally:
        assert Archived.open == 0


def test_archives_count_before_anything_is_taken_out_of_them(tmp_path):
    """Three archives of 1000 bytes exceed a build's limit of 2500 before they are unpacked; two do not."""
    fetch(tmp_path, FakeSource({}), "one", "two", max_bytes=2500)
    with pytest.raises(ResourcesExhausted, match=r"the archive of adapter .* 2000 were written; .* write 2500"):
        fetch(tmp_path, FakeSource({}), "one", "two", "three", max_bytes=2500)


def test_the_record_has_no_query(tmp_path):
    """The generation's record of an adapter's origin has a revision, and no signature."""
    _, [fetched] = fetch(tmp_path, FakeSource({}), "one")
    assert fetched.source.repo == "https://h/one"
    assert len(fetched.source.revision) == 64


def test_one_fault_is_reported_with_its_adapter(tmp_path):
    """The fault of one adapter keeps its reason, and its adapter is marked."""
    source = FakeSource({"https://h/two": RepoNotFound("nothing")})
    with pytest.raises(RepoNotFound, match="adapter 'two': nothing") as failure:
        fetch(tmp_path, source, "one", "two")
    assert failure.value.__notes__ == [f"one=FETCHING,two={Stage.REFUSED.value}"]


def test_every_fault_is_reported(tmp_path):
    """Each of several faults is a finding, and the whole is the first that trying again does not cure."""
    faults = {
        "https://h/a": SourceUnavailable("away"),
        "https://h/b": RepoGated("gated"),
        "https://h/c": SourceChanged("changed"),
    }
    with pytest.raises(RepoGated, match="the sources of 3 adapters failed: a, b, c") as failure:
        fetch(tmp_path, FakeSource(faults), "a", "b", "c", "d")
    stated = [(item.code, item.adapter, item.fix) for item in failure.value.findings]
    assert stated == [
        ("SOURCE_UNAVAILABLE", "a", "away"),
        ("REPO_GATED", "b", "gated"),
        ("SOURCE_CHANGED", "c", "changed"),
    ]
    assert failure.value.retry_after_s is None
    del faults["https://h/b"]
    with pytest.raises(SourceUnavailable):
        fetch(tmp_path, FakeSource(faults), "a", "c")


def test_an_adapter_has_a_size(tmp_path):
    """A listing of more than an adapter can have is refused before anything is fetched."""
    source = FakeSource({}, {**dict.fromkeys(FILES, 1), "adapter_model.safetensors": 9 << 30})
    with pytest.raises(SourceRefused, match=r"https://h/one: 9663676417 bytes; an adapter has at most"):
        fetch(tmp_path, source, "one")
