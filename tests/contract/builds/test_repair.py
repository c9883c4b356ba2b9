"""A bundle that is damaged in its store, and the build that finds it there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import AdapterProgress
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from tests.support import folders
from tests.support.adapters import write_adapter, write_base
from tests.support.examples import spread


@pytest.fixture
def context(store: Store, tmp_path: Path) -> BuildContext:
    """A base and an adapter in folders, and where they are built."""
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "one")
    return folders.workshop(tmp_path, store)


def built(context: BuildContext, folder: Path) -> AdapterProgress:
    """Build with every byte read back, and return the state of the adapter."""
    return folders.built(folders.deployment_of(folder, "one"), context, verify=True).progress.adapters[0]


def flip(data: bytes) -> bytes:
    """Flip one bit in the middle, as a faulty disk does."""
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


def test_a_build_repairs_what_is_damaged(store: Store, tmp_path: Path, context: BuildContext) -> None:
    """A damaged bundle is put again and reported as repaired, not as reused; then replicas can read it."""
    digest = built(context, tmp_path).digest
    some = DAMAGES if isinstance(store, MemoryStore) else spread([*DAMAGES], 3)
    for damage in some:
        file, change = DAMAGES[damage]
        key = bundle_key(digest, file)
        damaged = change(store.get(key))
        store.delete(key) if damaged is None else store.put(key, damaged)
        with pytest.raises(BundleCorrupt):
            read_bundle(store, digest)
        again = built(context, tmp_path)
        assert (again.digest, again.reused, again.repaired) == (digest, False, True), damage
        read_bundle(store, digest)
    last = built(context, tmp_path)
    assert (last.reused, last.repaired) == (True, False)
    served = current_generation(store, "tiny")
    assert served.number == 1


def test_what_a_killed_build_left_is_no_damage(store: Store, tmp_path: Path, context: BuildContext) -> None:
    """Files without a manifest and no generation are published, neither reused nor repaired."""
    digest = built(context, tmp_path).digest
    for key in [*store.list("deployments/")]:
        store.delete(key)
    store.delete(bundle_key(digest, MANIFEST_FILE))
    store.put(bundle_key(digest, WEIGHTS_FILE), b"half")
    again = built(context, tmp_path)
    assert (again.reused, again.repaired) == (False, False)
    read_bundle(store, digest)
