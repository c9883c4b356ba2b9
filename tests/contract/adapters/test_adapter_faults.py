"""A load that is killed, a disk that is full, a store that is far: never served, others unaffected."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from inference_service.adapters.disk import DiskTier
from inference_service.adapters.loader import AdapterLoader
from inference_service.adapters.reading import Tier
from loramux_shared.storage.local import LocalStore
from tests.contract.adapters.failing_loaders import load_on_full_disk, load_until_killed
from tests.support.examples import SWEEPING
from tests.support.processes.forks import Forked
from tests.support.stores.bundles import FakePacked, KeepingReader, Loaded, build_bundles, load
from tests.support.waiting import BOUND_S, wait_until

EVERY = 1 if os.environ.get(SWEEPING) else 3
"""The first of so many touches of the disk ends a process."""


@pytest.fixture
def local(tmp_path: Path) -> tuple[LocalStore, Path, list[str]]:
    """A store in a folder with two bundles."""
    folder = tmp_path / "store"
    store = LocalStore(folder)
    return store, folder, build_bundles(store, tmp_path / "inputs", 2)


def serves(store: LocalStore, cache: Path, digests: list[str]) -> list[str]:
    """Load bundles with a cache as it was left, and return where each was found; all of it is right."""
    disk = DiskTier(cache, 10**9)
    reader = KeepingReader(store, disk)
    loader = AdapterLoader(reader, FakePacked)
    tiers = []
    for digest in digests:
        found = load(loader, digest)
        assert isinstance(found, Loaded)
        assert found.packed.bundle.digest == digest
        tiers.append(found.tier)
    reader.await_kept(len(digests))
    loader.close()
    return tiers


def await_swept(cache: Path) -> None:
    """Wait until nothing of killed processes is left; a replica that has just started sweeps it beside us."""

    def left() -> list[Path]:
        return list(cache.glob(".part-*"))

    wait_until(lambda: not left(), "a cache without leftovers", left)


@pytest.mark.parametrize("bound", [pytest.param("roomy", marks=pytest.mark.sweep), "narrow"])
def test_kill_9_at_any_touch_of_the_disk_leaves_no_wrong_bundle(local, tmp_path, bound):
    """A killed replica leaves a whole bundle or none, and the next start sweeps the rest."""
    store, folder, digests = local
    one = sum(path.stat().st_size for path in (folder / "bundles" / "sha256" / digests[0]).iterdir())
    limit = 10**9 if bound == "roomy" else int(one * 1.5)  # narrow: each bundle that comes makes one leave
    caches, deaths, status = tmp_path / "caches", -1, -signal.SIGKILL
    while status:
        assert status == -signal.SIGKILL
        deaths += 1
        number = 1 + EVERY * deaths
        status = Forked(load_until_killed, number, caches / str(number), folder, limit, digests).wait(BOUND_S)
    assert deaths > (20 if bound == "roomy" else 30) / EVERY
    left = 0
    for number in range(1, 1 + EVERY * deaths, EVERY):
        cache = caches / str(number)
        for path in cache.glob(".part-*"):
            os.utime(path, (0, 0))  # older than any that is young
            left += 1
        serves(store, cache, digests)
        DiskTier(cache, 10**9).sweep()
        await_swept(cache)
        assert serves(store, cache, digests) == [Tier.DISK] * 2
    assert left > 5 / EVERY  # it was killed in the middle of writing, too


@pytest.mark.parametrize("limit", [0, 200, 1000])
def test_a_full_disk_fails_no_load(local, tmp_path, limit):
    """Loads continue when a write stops in the middle, and half a file is never used."""
    store, folder, digests = local
    cache, (reads, writes) = tmp_path / "cache", multiprocessing.Pipe(duplex=False)
    with writes:
        process = Forked(load_on_full_disk, limit, cache, folder, digests, writes)
    with os.fdopen(os.dup(reads.fileno())) as output:
        text = output.read()
    assert process.wait(BOUND_S) == 0, text
    assert text.count("without the cache") == 1
    assert not list(cache.glob(".part-*"))
    assert serves(store, cache, digests) == [Tier.STORE] * 2
    assert serves(store, cache, digests) == [Tier.DISK] * 2
