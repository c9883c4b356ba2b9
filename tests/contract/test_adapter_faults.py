"""A load that is killed, a disk that is full, a store that is far: never served, others unaffected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inference_service.serving.adapters.disk import YOUNG_S, DiskTier
from inference_service.serving.adapters.loader import AdapterLoader, Loaded
from inference_service.serving.adapters.reading import BundleReader, Tier
from loramux_shared.bundle.manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from loramux_shared.storage.local import LocalStore
from loramux_shared.storage.open import open_store
from tests.support.bundles import FakePacked, Unsteady, build_bundles, load, settle, waiting
from tests.support.s3_gateway import S3Server

# Processes that are killed at their n-th touch of the cache folder for n = 1, 2, ..., until one lives. An audit
# hook sees every open, rename, mkdir and removal before it happens. They are forks: packages are imported once.
DIES = """
import os, signal, sys, pathlib
from inference_service.serving.adapters.disk import DiskTier
from inference_service.serving.adapters.loader import AdapterLoader
from inference_service.serving.adapters.reading import BundleReader
from loramux_shared.storage.local import LocalStore
from tests.support.bundles import FakePacked, load, settle
root, store, limit, *digests = sys.argv[1:]

def lives(number):
    cache = pathlib.Path(root) / str(number)
    touched = [0]
    def hook(event, arguments):
        if any(str(cache) in str(each) for each in arguments):
            touched[0] += 1
            if touched[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    reader = BundleReader(LocalStore(pathlib.Path(store)), DiskTier(cache, int(limit)))
    loader = AdapterLoader(reader, FakePacked)
    sys.addaudithook(hook)
    for digest in (*digests, digests[0]):
        load(loader, digest)
        settle(loader)
    os._exit(0)

number, status = 0, 1
while status:
    number += 1
    pid = os.fork()
    if pid == 0:
        lives(number)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
print(number)
"""
# Processes whose files may have so many bytes, which ends them or fails their writes: forks again.
FILLS = """
import json, os, resource, signal, sys, pathlib, traceback
from inference_service.serving.adapters.disk import DiskTier
from inference_service.serving.adapters.loader import AdapterLoader, Loaded
from inference_service.serving.adapters.reading import BundleReader
from loramux_shared.storage.local import LocalStore
from tests.support.bundles import FakePacked, load, settle
root, store, cases, *digests = sys.argv[1:]

def lives(case):
    limit, kills = case.split("-")
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills == "yes" else signal.SIG_IGN)
    reader = BundleReader(LocalStore(pathlib.Path(store)), DiskTier(pathlib.Path(root) / case, 10**9))
    loader = AdapterLoader(reader, FakePacked)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    for digest in digests:
        assert isinstance(load(loader, digest), Loaded)
        settle(loader)

found = {}
for case in cases.split():
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writes, 1)
        status = 0
        try:
            lives(case)
        except BaseException:
            status, problem = 1, traceback.format_exc()
            print(problem)
        sys.stdout.flush()
        os._exit(status)
    os.close(writes)
    said = open(reads).read()
    found[case] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
print(json.dumps(found))
"""
LIMITS = (0, 1, 200, 1000)


@pytest.fixture
def local(tmp_path: Path) -> tuple[LocalStore, Path, list[str]]:
    """A store in a folder with two bundles."""
    folder = tmp_path / "store"
    store = LocalStore(folder)
    return store, folder, build_bundles(store, tmp_path / "inputs", 2)


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of this test."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def serves(store: LocalStore, cache: Path, digests: list[str]) -> list[Tier]:
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
    until = time.monotonic() + 20
    while left := list(cache.glob(".part-*")):
        assert time.monotonic() < until, left
        time.sleep(0.01)


@pytest.mark.parametrize("bound", [pytest.param("roomy", marks=pytest.mark.sweep), "narrow"])
def test_kill_9_at_any_touch_of_the_disk_leaves_no_wrong_bundle(local, tmp_path, bound):
    """Whatever a killed replica left is either a whole bundle or none, and the next start sweeps the rest."""
    store, folder, digests = local
    one = sum(path.stat().st_size for path in (folder / "bundles" / "sha256" / digests[0]).iterdir())
    limit = 10**9 if bound == "roomy" else int(one * 1.5)  # narrow: each bundle that comes makes one leave
    done = in_a_process(DIES, tmp_path / "caches", folder, limit, *digests)
    assert done.returncode == 0, done.stderr[-2000:]
    deaths = int(done.stdout) - 1
    assert deaths > (20 if bound == "roomy" else 30)
    old = time.time() - 2 * YOUNG_S
    left = 0
    for number in range(1, deaths + 1):
        cache = tmp_path / "caches" / str(number)
        for path in cache.glob(".part-*"):
            os.utime(path, (old, old))
            left += 1
        serves(store, cache, digests)
        DiskTier(cache, 10**9).sweep()
        await_swept(cache)
        assert serves(store, cache, digests) == [Tier.DISK] * 2
    assert left > 5  # it was killed in the middle of writing, too


def filled(caches: Path, store: Path, cases: str, digests: list[str]) -> dict[str, tuple[int, str]]:
    """How processes of limits ended, and what they said; each has a cache of its own."""
    done = in_a_process(FILLS, caches, store, cases, *digests)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[LocalStore, Path, list[str], dict[str, tuple[int, str]]]:
    """A store with two bundles, and what became of processes on disks of all sizes that load them."""
    folder = tmp_path_factory.mktemp("full")
    store = LocalStore(folder / "store")
    digests = build_bundles(store, folder / "inputs", 2)
    cases = " ".join(f"{limit}-{kills}" for limit in LIMITS for kills in ("no", "yes"))
    return store, folder, digests, filled(folder, folder / "store", cases, digests)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("kills", ["no", "yes"])
def test_a_disk_that_takes_no_more_fails_no_load(full, limit, kills):
    """When a write stops in the middle, or ends the process there, loads go on and half a file is never one."""
    store, folder, digests, found = full
    cache = folder / f"{limit}-{kills}"
    status, said = found[cache.name]
    if kills == "no":
        assert status == 0, said
        assert said.count("without being kept") == 1
        assert not list(cache.glob(".part-*"))
    else:
        assert status < 0
    assert serves(store, cache, digests) == [Tier.STORE] * 2
    assert serves(store, cache, digests) == [Tier.DISK] * 2


@pytest.mark.parametrize("name", [MANIFEST_FILE, WEIGHTS_FILE, CONFIG_FILE, "chat_template.jinja"])
def test_a_flipped_byte_on_the_disk_is_fetched_again_by_a_load(local, tmp_path, name):
    """The load that meets it is served from the store, and the next one from the disk."""
    store, _, digests = local
    cache = tmp_path / "cache"
    serves(store, cache, digests)
    path = cache / digests[0] / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    assert serves(store, cache, digests) == [Tier.STORE, Tier.DISK]
    assert serves(store, cache, digests) == [Tier.DISK, Tier.DISK]


def test_what_is_on_the_disk_outlives_the_store(tmp_path):
    """While the store is away, kept bundles are served, others fail by name, and later all are."""
    store = Unsteady()
    digests = build_bundles(store, tmp_path / "inputs", 2)
    loader = AdapterLoader(BundleReader(store, DiskTier(tmp_path / "cache", 10**9)), FakePacked)
    load(loader, digests[0])
    settle(loader)
    store.away = True
    found = load(loader, digests[0])
    assert isinstance(found, Loaded)
    assert found.tier is Tier.DISK
    failed = load(loader, digests[1])
    assert getattr(failed, "reason", "") == "STORE_UNAVAILABLE"
    store.away = False
    assert isinstance(load(loader, digests[1]), Loaded)
    loader.close()


def test_two_processes_share_a_cache(local, tmp_path):
    """Two replicas that start with one empty cache both serve, and leave one whole copy of each bundle."""
    store, folder, digests = local
    cache = tmp_path / f"{10**9}-no"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: filled(tmp_path, folder, cache.name, digests), range(2)))
    assert [each[cache.name][0] for each in done] == [0, 0], done
    assert sorted(path.name for path in cache.iterdir()) == sorted(digests)
    assert serves(store, cache, digests) == [Tier.DISK] * 2


def test_bundles_come_from_s3(aws: S3Server, tmp_path: Path) -> None:
    """From a real server of S3 many bundles come at once, each as it is in the store."""
    store = open_store(f"s3://{aws.new_bucket()}/some/prefix")
    digests = build_bundles(store, tmp_path / "inputs", 12)
    loader = AdapterLoader(BundleReader(store, DiskTier(tmp_path / "cache", 10**9)), FakePacked)
    outcomes = [waiting(loader, digest) for digest in digests]
    for digest, outcome in zip(digests, outcomes, strict=True):
        found = outcome(60)
        assert isinstance(found, Loaded)
        assert found.packed.bundle.digest == digest
    loader.close()


def test_latency_is_paid_for_a_dozen_at_once(tmp_path: Path) -> None:
    """At 30 ms a request, 48 bundles take a tenth of what they take one request after another."""
    store = Unsteady()
    digests = build_bundles(store, tmp_path / "inputs", 48)
    store.latency_s = 0.03
    store.asked.clear()
    loader = AdapterLoader(BundleReader(store, None), FakePacked)
    began = time.monotonic()
    outcomes = [waiting(loader, digest) for digest in digests]
    assert all(isinstance(outcome(60), Loaded) for outcome in outcomes)
    took = time.monotonic() - began
    one_by_one = len(store.asked) * store.latency_s
    assert store.at_once >= 12
    assert took < one_by_one / 4, (took, one_by_one)
    loader.close()
