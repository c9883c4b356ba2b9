"""A bundle that is damaged in its store, and the build that finds it there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import AdapterProgress, Progress
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.deployment import Deployment
from loramux_shared.deployment_file import parse_deployment
from loramux_shared.faults import BundleCorrupt
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from tests.support.adapters import write_adapter, write_base


@pytest.fixture
def wish(tmp_path: Path) -> Deployment:
    """A deployment of one adapter, in folders."""
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    repository = {"source": "LOCAL", "repo": str(base)}
    adapters = {"one": {"source": "LOCAL", "repo": str(adapter)}}
    made = {"checkpoint_repository": repository, "lora_adapters": adapters}
    return parse_deployment({"model_name": "tiny", "build": made}).deployment


def built(wish: Deployment, store: Store, folder: Path, *, verify: bool = True) -> AdapterProgress:
    """Build, and return what the build says of its adapter."""
    progress = Progress(["one"])
    context = BuildContext(store, open_sources(local_roots=[folder]), folder / "work")
    build(wish, context, progress, verify=verify)
    return progress.adapters[0]


def flip(data: bytes) -> bytes:
    """One bit in the middle, as a disk does it."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "a flipped bit in the weights": (WEIGHTS_FILE, flip),
    "cut weights": (WEIGHTS_FILE, lambda data: data[:-100]),
    "lost weights": (WEIGHTS_FILE, lambda _: None),
    "a flipped bit in the config": (CONFIG_FILE, flip),
    "a flipped bit in the manifest": (MANIFEST_FILE, flip),
    "an empty manifest": (MANIFEST_FILE, lambda _: b""),
    "a lost manifest": (MANIFEST_FILE, lambda _: None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_build_repairs_what_is_damaged(store: Store, tmp_path: Path, wish: Deployment, damage: str) -> None:
    """A damaged bundle is put again and reported as repaired, not as reused; then replicas can read it."""
    digest = built(wish, store, tmp_path).digest
    file, change = DAMAGES[damage]
    key = bundle_key(digest, file)
    damaged = change(store.get(key))
    store.delete(key) if damaged is None else store.put(key, damaged)
    with pytest.raises(BundleCorrupt):
        read_bundle(store, digest)
    again = built(wish, store, tmp_path)
    assert (again.digest, again.reused, again.repaired) == (digest, False, True)
    read_bundle(store, digest)
    last = built(wish, store, tmp_path)
    assert (last.reused, last.repaired) == (True, False)
    served = current_generation(store, "tiny")
    assert served is not None
    assert served.number == 1


def test_what_a_killed_build_left_is_no_damage(store: Store, tmp_path: Path, wish: Deployment) -> None:
    """Files without a manifest and no generation: they are published, neither reused nor repaired."""
    digest = built(wish, store, tmp_path).digest
    for key in [*store.list("deployments/")]:
        store.delete(key)
    store.delete(bundle_key(digest, MANIFEST_FILE))
    store.put(bundle_key(digest, WEIGHTS_FILE), b"half")
    again = built(wish, store, tmp_path)
    assert (again.reused, again.repaired) == (False, False)
    read_bundle(store, digest)
