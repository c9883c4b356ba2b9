"""The work of a build: side by side, each thing once, within the disk, patient with its store."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import RESERVE_BYTES, Ledger, Space, claim_identity
from builder_service.pipeline.progress import Progress, Stage
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import AdapterInvalid, BuildCancelled, ResourcesExhausted, StoreUnavailable
from loramux_shared.storage import patient
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.patient import PatientStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.folders import deployment_of, workshop
from tests.support.own_time import OwnTime
from tests.support.waiting import BOUND_S


class Counting(MemoryStore):
    """Remembers what was put, and by which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[str] = []
        self.threads: set[int] = set()
        self.together = threading.Barrier(2)

    def put(self, key: str, data: bytes | Path) -> None:
        """Store, and remember."""
        self.puts.append(key)
        self.threads.add(threading.get_ident())
        super().put(key, data)


@pytest.fixture
def context(tmp_path):
    """A workshop over an empty store."""
    write_base(tmp_path / "base")
    return workshop(tmp_path, Counting())


def test_identical_adapters_are_converted_once(tmp_path, context):
    """Three names of the same files have one bundle, one upload and one conversion; all are DONE."""
    for name in ("a", "b", "c"):
        write_adapter(tmp_path / name)
    write_adapter(tmp_path / "d", tensors(seed=1))
    seen = []
    progress = Progress("abcd", lambda: seen.append(progress.adapters))
    records = build(deployment_of(tmp_path, *"abcd"), context, progress).generation.adapters
    assert len({record.digest for record in records.values()}) == 2
    assert sum(key.endswith("weights.npy") for key in context.store.puts) == 2
    assert [adapter.stage for adapter in progress.adapters] == [Stage.DONE] * 4
    converted = {
        adapter.name
        for adapters in seen
        for adapter in adapters
        if adapter.stage is Stage.CONVERTING and adapter.bytes_done
    }
    assert len(converted) == 2
    for record in records.values():
        read_bundle(context.store, record.digest)


class Meeting(Counting):
    """Weights are only put when those of another adapter are put at the same time."""

    def put(self, key: str, data: bytes | Path) -> None:
        """Store while others do."""
        if key.endswith("weights.npy"):
            self.together.wait(BOUND_S)
        super().put(key, data)


def test_adapters_are_published_side_by_side(tmp_path, context):
    """Two adapters of one build are put at once; with one at a time this would never end."""
    for i, name in enumerate("abcd"):
        write_adapter(tmp_path / name, tensors(seed=i))
    context = replace(context, store=Meeting(), parallel_adapters=2)
    build(deployment_of(tmp_path, *"abcd"), context, Progress("abcd"))
    assert len(context.store.threads) >= 2


def test_nothing_is_published_before_everything_is_valid(tmp_path, context):
    """The last adapter of many is bad: not one byte was written to the store."""
    for i in range(12):
        write_adapter(tmp_path / f"a{i:02}", tensors(seed=i))
    write_adapter(tmp_path / "z", task_type="SEQ_CLS")
    names = [*(f"a{i:02}" for i in range(12)), "z"]
    with pytest.raises(AdapterInvalid):
        build(deployment_of(tmp_path, *names), context, Progress(names))
    assert context.store.puts == []


def test_a_build_stays_within_its_room(tmp_path, context):
    """A build that may write less than its adapters have is refused with both numbers, before it fetches."""
    write_adapter(tmp_path / "a")
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    seen = []
    progress = Progress("a", lambda: seen.append(progress.adapters[0].bytes_done))
    with pytest.raises(ResourcesExhausted, match=f"{size} bytes.* may write 1000"):
        build(deployment_of(tmp_path, "a"), replace(context, max_build_bytes=1000), progress)
    assert set(seen) == {0}
    with pytest.raises(ResourcesExhausted, match="the bundle of adapter 'a'"):
        build(deployment_of(tmp_path, "a"), replace(context, max_build_bytes=size + 10), Progress("a"))
    assert context.store.puts == []
    build(deployment_of(tmp_path, "a"), replace(context, max_build_bytes=3 * size), Progress("a"))


def test_builds_share_the_disk(tmp_path):
    """Bytes that one build has announced and not written yet are not free for another."""
    ledger = Ledger()
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    one, two = Space(tmp_path, ledger, None), Space(tmp_path, ledger, None)
    with (
        one.writing(free * 2 // 3, "one"),
        pytest.raises(ResourcesExhausted, match=rf"two: {free * 2 // 3} bytes; with {free * 2 // 3} that"),
    ):
        two.check(free * 2 // 3, "two")
    two.check(free // 3, "two")


def test_a_disk_with_less_than_the_reserve_is_told_the_truth(tmp_path):
    """The fault has the free bytes, the reserve and the missing bytes, not that nothing is free."""
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(ResourcesExhausted) as refusal:
        Space(tmp_path, Ledger(), None).check(free, "the adapters")
    stated = re.fullmatch(
        rf"the adapters: {free} bytes; with 0 that running builds are about to write and {RESERVE_BYTES} that "
        r"stay free for others, the disk of the builder's work folder needs (\d+) free bytes and has (\d+)\. "
        r"Free (\d+), or set LORAMUX_WORK_DIR to a folder on a larger disk\.",
        refusal.value.message,
    )
    needed, has, missing = map(int, stated.groups())
    assert needed == free + RESERVE_BYTES
    assert abs(has - free) < 1 << 30
    assert missing == needed - has


class Flaky(Counting):
    """Does not answer for a while."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def put(self, key: str, data: bytes | Path) -> None:
        """Store, at last."""
        if self.times:
            self.times -= 1
            raise StoreUnavailable("the store is away")
        super().put(key, data)


def test_a_store_that_comes_back_is_waited_for(monkeypatch):
    """An operation is tried again with growing pauses, and fails with the store's own words after the last."""
    monkeypatch.setattr(patient, "time", time := OwnTime())
    store = PatientStore(Flaky(2), pauses_s=(1, 2))
    store.put("k", b"x")
    assert list(store.list("")) == ["k"]
    assert time.now_s == pytest.approx(3)
    with pytest.raises(StoreUnavailable, match="the store is away"):
        PatientStore(Flaky(3), pauses_s=(1, 2)).put("k", b"x")


def test_waiting_for_a_store_can_be_stopped(monkeypatch):
    """A build that is cancelled does not wait for its store any longer."""
    progress = Progress(())

    class Cancelling(OwnTime):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            progress.stop(BuildCancelled("enough"))

    monkeypatch.setattr(patient, "time", time := Cancelling())
    store = PatientStore(Flaky(10), progress.check, pauses_s=(3600.0,))
    with pytest.raises(BuildCancelled, match="enough"):
        store.put("k", b"x")
    assert time.now_s < 1


def test_identities_are_kept_and_not_shared(tmp_path):
    """Living builders of one work folder differ; the next start of one has its identity again."""
    one, two = claim_identity(tmp_path), claim_identity(tmp_path)
    assert one.name != two.name
    one._file.close()
    again = claim_identity(tmp_path)
    assert again.name == one.name
    (tmp_path / "loramux-builder-2.id").write_text("cut of")
    assert len(claim_identity(tmp_path).name) == 16


def test_an_owners_folders_are_swept_at_its_start(tmp_path, context):
    """Folders of a killed owner go at its next start; the folders of others stay."""
    context = replace(context, owner="0" * 16)
    for name in (f"loramux-build-{'0' * 16}-x", f"loramux-build-{'1' * 16}-x"):
        (tmp_path / "work" / name).mkdir(parents=True)
    context.sweep()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [f"loramux-build-{'1' * 16}-x"]
