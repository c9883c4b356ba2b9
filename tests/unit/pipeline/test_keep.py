"""Builds of existing deployments: unchanged adapters are neither fetched nor read nor converted."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import AdapterProgress, Progress
from builder_service.pipeline.update import Update, update
from loramux_shared.bundle.deployments import publish_change
from loramux_shared.bundle.generation import CONVERTER, Generation, current_key
from loramux_shared.bundle.manifest import FileDigest, bundle_key
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Deployment, SourceKind
from loramux_shared.sources.base import Resolved, unwatched
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources
from loramux_shared.storage.base import Entry
from loramux_shared.storage.memory import MemoryStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import deployment_of, local_repository

MANY = 100


class CountingSource(LocalSource):
    """Counts what is listed and fetched, by the folder's name."""

    def __init__(self, roots: list[Path]) -> None:
        super().__init__(roots)
        self.listed, self.fetched = Counter[str](), Counter[str]()

    def resolve(self, repository, progress=unwatched, room=unwatched) -> Resolved:
        self.listed[Path(repository.repo).name] += 1
        return super().resolve(repository, progress, room)

    def fetch(self, resolved, names, into, progress=unwatched) -> dict[str, FileDigest]:
        files = super().fetch(resolved, names, into, progress)
        self.fetched[Path(resolved.repository.repo).name] += sum(file.size for file in files.values())
        return files


class CountingStore(MemoryStore):
    """Counts operations and bytes of bundles."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.written, self.looks = 0, 0, 0

    def get(self, key: str, bound: int | None = None) -> bytes:
        data = super().get(key, bound)
        self.read += len(data) if key.startswith("bundles/") else 0
        return data

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        self.written += len(self.objects[key]) if key.startswith("bundles/") else 0

    def sha256(self, key: str) -> str | None:
        self.read += len(self.objects.get(key, b""))
        return super().sha256(key)

    def list(self, prefix: str) -> Iterator[str]:
        self.looks += prefix.startswith("bundles/")
        return super().list(prefix)

    def entries(self, prefix: str) -> Iterator[Entry]:
        self.looks += prefix.startswith("bundles/")
        for key in super().list(prefix):
            yield Entry(key, len(self.objects[key]), self.modified[key])


class World:
    """A base, adapters, and a builder whose work is counted."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        write_base(folder / "base")
        self.names = [f"a{i:03}" for i in range(count)]
        for seed, name in enumerate(self.names):
            write_adapter(folder / name, tensors(seed=seed))
        self.source, self.store = CountingSource([folder]), CountingStore()
        sources = Sources({SourceKind.LOCAL: self.source}, folder / "work")
        self.context = BuildContext(self.store, sources, folder / "work")

    def deployment(self, **lora: object) -> Deployment:
        """A deployment of all adapters."""
        return deployment_of(self.folder, *self.names, name="d", lora_configuration=lora)

    def build(self, deployment: Deployment, *, verify: bool = False) -> dict[str, AdapterProgress]:
        self.reset()
        progress = Progress(deployment.build.lora_adapters)
        build(deployment, self.context, progress, verify=verify)
        return {adapter.name: adapter for adapter in progress.adapters}

    def reset(self) -> None:
        self.source.listed.clear()
        self.source.fetched.clear()
        self.store.read = self.store.written = self.store.looks = 0


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path, 2)
    made.build(made.deployment())
    return made


def test_an_update_does_not_even_list_the_others(tmp_path: Path) -> None:
    """An update neither lists, fetches nor looks up the other adapters and the base."""
    many = World(tmp_path, MANY)
    many.build(many.deployment())
    write_adapter(many.folder / "new", tensors(seed=1000))
    many.reset()
    wish = Update(name="d", add={"new": local_repository(many.folder / "new")})
    result = update(wish, many.context, Progress(["new"]))
    assert len(result.generation.adapters) == MANY + 1
    assert many.source.listed == {"new": 1}
    assert set(many.source.fetched) == {"new"}
    assert (many.store.looks, many.store.read) == (1, 0)  # at the new bundle, once it is there
    read_bundle(many.store, result.generation.adapters["new"].digest)


def touch(path: Path) -> None:
    later = time.time_ns() + 1_000_000_000
    os.utime(path, ns=(later, later))


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "nothing": (lambda _: None, {}),
    "a file that was written again": (lambda folder: touch(folder / "a000" / "adapter_config.json"), {}),
    "another ceiling": (lambda _: None, {"max_lora_rank": 32}),
    "another type": (lambda _: None, {"dtype": "float32"}),
    "another base": (lambda folder: write_base(folder / "base", rms_norm_eps=1e-3), {}),
    "one more file": (lambda folder: (folder / "a000" / "chat_template.jinja").write_text("x"), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_that_make_an_adapter_again(world: World, change: str) -> None:
    """Changed files, base or settings make an adapter again. Nothing else does."""
    act, lora = CHANGES[change]
    act(world.folder)
    assert world.build(world.deployment(**lora))["a000"].kept is (change == "nothing")


def test_another_converter_makes_all_again(world: World) -> None:
    """A release with other rules or arithmetic reuses no adapter of an earlier release."""

    def by_another(before: Generation) -> Generation:
        others = {
            name: record.model_copy(update={"converter": CONVERTER + 1})
            for name, record in before.adapters.items()
        }
        return before.model_copy(update={"adapters": others})

    publish_change(world.store, "d", by_another)
    assert not any(adapter.kept for adapter in world.build(world.deployment()).values())
    assert all(adapter.kept for adapter in world.build(world.deployment()).values())


@pytest.mark.parametrize("file", ["manifest.json", "model.lora_weights.npy", "model.lora_config.npy"])
def test_a_bundle_that_is_not_whole_is_made_again(world: World, file: str) -> None:
    """A build without verify sees that a file is lost, and puts it back."""
    digest = world.build(world.deployment())["a000"].digest
    world.store.delete(bundle_key(digest, file))
    reported = world.build(world.deployment())
    assert (reported["a000"].kept, reported["a000"].repaired, reported["a001"].kept) == (False, True, True)
    read_bundle(world.store, digest)


def test_damage_is_found_by_a_build_that_verifies(world: World) -> None:
    """A flipped bit is no lost file: a plain build keeps the bundle, one with verify repairs it."""
    digest = world.build(world.deployment())["a000"].digest
    key = bundle_key(digest, "model.lora_weights.npy")
    data = world.store.objects[key]
    world.store.objects[key] = data[:-1] + bytes([data[-1] ^ 1])
    assert world.build(world.deployment())["a000"].kept
    reported = world.build(world.deployment(), verify=True)
    assert (reported["a000"].kept, reported["a000"].repaired) == (False, True)
    assert (reported["a001"].kept, reported["a001"].reused) == (True, True)
    read_bundle(world.store, digest)


def test_a_bundle_that_is_reused_of_an_unserved_generation_is_made_young(world: World) -> None:
    """A manifest that the served generation does not refer to is put again, so that `loramux gc` spares it."""
    served = world.store.objects[current_key("d")]
    world.names.append("new")
    write_adapter(world.folder / "new", tensors(seed=9))
    built = world.build(world.deployment())
    world.store.objects[current_key("d")] = served
    keys = [bundle_key(built[name].digest, "manifest.json") for name in ("a000", "new")]
    old = datetime.fromtimestamp(0, UTC)
    world.store.modified |= dict.fromkeys(keys, old)
    assert world.build(world.deployment())["new"].kept
    assert [world.store.modified[key] > old for key in keys] == [False, True]
