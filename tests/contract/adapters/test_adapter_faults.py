"""A load that is killed, a disk that is full, a store that is far: never served, others unaffected."""

import multiprocessing
import os
import signal
from io import TextIOWrapper
from pathlib import Path

import pytest

from inference_service.adapters.disk import DiskTier
from inference_service.adapters.loader import AdapterLoader
from inference_service.adapters.reading import BundleReader, Tier
from loramux_shared.storage.local import LocalStore
from tests.support.bundles import FakePacked, Loaded, build_bundles, load, settle
from tests.support.dying import dies_at_a_touch, fills
from tests.support.examples import SWEEPING
from tests.support.forks import Forked
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
    loader = AdapterLoader(BundleReader(store, disk), FakePacked)
    tiers = []
    for digest in digests:
        found = load(loader, digest)
        assert isinstance(found, Loaded)
        assert found.packed.bundle.digest == digest
        tiers.append(found.tier)
    settle(loader)
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
        status = Forked(dies_at_a_touch, number, caches / str(number), folder, limit, digests).wait(BOUND_S)
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


def filling(
    limit: int, kills: bool, cache: Path, store: Path, digests: list[str]
) -> tuple[Forked, TextIOWrapper]:
    """A process that loads bundles onto a disk of a size, and its output."""
    reads, writes = multiprocessing.Pipe(duplex=False)
    with writes:
        process = Forked(fills, limit, kills, cache, store, digests, writes)
    return process, os.fdopen(os.dup(reads.fileno()))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[LocalStore, Path, list[str]]:
    """A store with two bundles."""
    folder = tmp_path_factory.mktemp("full")
    store = LocalStore(folder / "store")
    return store, folder, build_bundles(store, folder / "inputs", 2)


@pytest.mark.parametrize(("limit", "kills"), [(0, False), (200, False), (1000, False), (200, True)])
def test_a_full_disk_fails_no_load(full, limit, kills):
    """Loads continue when a write stops in the middle or ends the process, and half a file is never used."""
    store, folder, digests = full
    cache = folder / f"{limit}-{kills}"
    process, stated = filling(limit, kills, cache, folder / "store", digests)
    if kills:
        assert process.wait(BOUND_S) == -signal.SIGXFSZ
    else:
        text = stated.read()
        assert process.wait(BOUND_S) == 0, text
        assert text.count("without the cache") == 1
        assert not list(cache.glob(".part-*"))
    assert serves(store, cache, digests) == [Tier.STORE] * 2
    assert serves(store, cache, digests) == [Tier.DISK] * 2
