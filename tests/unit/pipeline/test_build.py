"""Builds: what they fetch, and their work within the disk, the time and the folders that they have."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import LEFTOVER_S, RESERVE_BYTES, Ledger, Space, claim_identity
from builder_service.pipeline.fetch import FetchedAdapter, fetch_adapters
from builder_service.pipeline.progress import Progress
from loramux_shared import faults
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.sources.base import Resolved, SourceFile, unwatched
from loramux_shared.sources.files import content_digest
from loramux_shared.sources.open import Sources
from loramux_shared.storage import patient
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.patient import PatientStore
from tests.support.adapters import tensors, write_adapter, write_base
from tests.support.cases import cases
from tests.support.folders import context_of, deployment_of, local_source, run_build
from tests.support.waiting import OwnTime


@pytest.fixture
def context(tmp_path):
    """A workshop over an empty store."""
    write_base(tmp_path / "base")
    return context_of(tmp_path)


def test_the_same_adapter_has_the_same_digest_from_anywhere(tmp_path, context):
    """The digest follows from the adapter's bytes and the settings, not from where the adapter was."""
    write_adapter(tmp_path / "one")
    write_adapter(tmp_path / "deep" / "two")
    adapters = {"one": local_source(tmp_path / "one"), "two": local_source(tmp_path / "deep" / "two")}
    records = run_build(deployment_of(tmp_path, lora_adapters=adapters), context).generation.adapters
    assert records["one"].digest == records["two"].digest
    assert records["one"].source != records["two"].source


@pytest.mark.parametrize(("provided", "config", "expected"), cases(__file__, "test_storage_type"))
def test_storage_type(tmp_path, context, provided, config, expected):
    """Bundles have the type that was asked for, else the base's, else bfloat16."""
    write_base(tmp_path / "base", **config)
    write_adapter(tmp_path / "one")
    generation = run_build(
        deployment_of(tmp_path, "one", lora_configuration={"dtype": provided}), context
    ).generation
    assert generation.lora_dtype == expected
    assert read_manifest(context.store, generation.adapters["one"].digest).dtype == expected


def test_local_folders_need_a_root(tmp_path, context):
    """A folder outside the operator's roots is refused, also behind a link."""
    outside = write_adapter(tmp_path.parent / f"{tmp_path.name}-outside")
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(faults.SourceRefused, match=r"adapter 'link': LOCAL .* not below a folder"):
        run_build(deployment_of(tmp_path, "link"), context)
    write_adapter(tmp_path / "one")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    (tmp_path / "one" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with pytest.raises(faults.SourceRefused, match="not below a folder"):
        run_build(deployment_of(tmp_path, "one"), context)


def test_a_pinned_local_adapter_may_not_change(tmp_path, context):
    """A content digest as revision of a LOCAL repository holds it to that content."""
    write_adapter(tmp_path / "one")
    found = run_build(deployment_of(tmp_path, "one"), context).generation.adapters["one"].source
    expected = deployment_of(
        tmp_path, lora_adapters={"one": local_source(tmp_path / "one") | {"revision": found.revision}}
    )
    assert run_build(expected, context).generation.adapters["one"].source == found
    write_adapter(tmp_path / "one", tensors(seed=1))
    with pytest.raises(faults.RevisionNotFound, match="expected content"):
        run_build(expected, context)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_base_that_is_none(tmp_path, context, missing):
    """A base without config or weights is named before any adapter is fetched."""
    (tmp_path / "base" / missing).unlink()
    with pytest.raises(faults.CheckpointInvalid, match=f"base checkpoint: .*expected {missing}"):
        run_build(deployment_of(tmp_path), context)


def test_old_work_folders_are_swept(tmp_path, context):
    """A folder of a killed builder is removed after a day, younger folders are not."""
    old, young = tmp_path / "work" / "loramux-build-a", tmp_path / "work" / "loramux-build-b"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, old.stat().st_mtime - LEFTOVER_S - 60))
    context.sweep()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [young.name]


FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 8}


class Archived(Resolved):
    """A listing that is in an archive of a thousand bytes, open until it is closed."""

    open = 0

    def close(self) -> None:
        Archived.open -= 1


class FakeSource:
    """Repositories in memory; one whose address is a reason fails with it."""

    def __init__(self, broken, sizes=None) -> None:
        self._broken = broken
        self._sizes = sizes or {name: len(data) for name, data in FILES.items()}

    def resolve(self, repository, progress=unwatched, room=unwatched) -> Resolved:
        """List the same files for everyone."""
        room(1000)
        progress(0)
        if repository.label in self._broken:
            raise self._broken[repository.label]
        Archived.open += 1
        return Archived(repository, {name: SourceFile(size) for name, size in self._sizes.items()})

    def fetch(self, resolved, names, into, progress=unwatched) -> dict[str, FileDigest]:
        del into, progress
        return {name: FileDigest(size=resolved.files[name].size, sha256="0" * 64) for name in names}

    digests = place = None

    def pin(self, resolved, files) -> Repository:
        return resolved.repository.model_copy(update={"revision": content_digest(files)})


def fetch(
    folder: Path, source: FakeSource, *names: str, max_bytes=None
) -> tuple[Progress, list[FetchedAdapter]]:
    adapters = {
        name: Repository(source=SourceKind.REMOTE_URL, repo=f"https://h/{name}?sig=canary") for name in names
    }
    progress = Progress(adapters)
    sources = Sources({SourceKind.REMOTE_URL: source})
    try:
        space = Space(folder, Ledger(), max_bytes)
        return progress, fetch_adapters(adapters, sources, space, folder, progress)
    except faults.Fault as fault:
        fault.add_note(",".join(f"{item.name}={item.stage.value}" for item in progress.adapters))
        raise
    finally:
        assert Archived.open == 0


def test_archives_count_before_anything_is_taken_out_of_them(tmp_path):
    """Three archives of 1000 bytes exceed a build's limit of 2500 before they are unpacked; two do not."""
    fetch(tmp_path, FakeSource({}), "one", "two", max_bytes=2500)
    with pytest.raises(
        faults.ResourcesExhausted, match=r"the archive of adapter .* 2000 were written; .* write 2500"
    ):
        fetch(tmp_path, FakeSource({}), "one", "two", "three", max_bytes=2500)


def test_every_fault_is_reported(tmp_path):
    """Each of several faults is a finding, and the whole is the first that trying again does not cure."""
    broken = {
        "https://h/a": faults.SourceUnavailable("away"),
        "https://h/b": faults.RepoGated("gated"),
        "https://h/c": faults.SourceChanged("changed"),
    }
    with pytest.raises(faults.RepoGated, match="3 adapters failed: a, b, c") as failure:
        fetch(tmp_path, FakeSource(broken), "a", "b", "c", "d")
    stated = [(item.code, item.adapter, item.fix) for item in failure.value.findings]
    assert stated == [
        ("SOURCE_UNAVAILABLE", "a", "away"),
        ("REPO_GATED", "b", "gated"),
        ("SOURCE_CHANGED", "c", "changed"),
    ]
    assert failure.value.retry_after_s is None
    del broken["https://h/b"]
    with pytest.raises(faults.SourceUnavailable):
        fetch(tmp_path, FakeSource(broken), "a", "c")


def test_an_adapter_has_a_size(tmp_path):
    """A listing of more than an adapter can have is refused before anything is fetched."""
    source = FakeSource({}, {**dict.fromkeys(FILES, 1), "adapter_model.safetensors": 9 << 30})
    with pytest.raises(faults.SourceRefused, match=r"https://h/one: 9663676417 bytes; an adapter has at most"):
        fetch(tmp_path, source, "one")


def test_a_build_stays_within_its_room(tmp_path, context):
    """A build that may write less than its adapters have is refused with both numbers, before it fetches."""
    write_adapter(tmp_path / "a")
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    seen = []
    progress = Progress("a", lambda: seen.append(progress.adapters[0].bytes_done))
    with pytest.raises(faults.ResourcesExhausted, match=f"{size} bytes.* may write 1000"):
        build(deployment_of(tmp_path, "a"), replace(context, max_build_bytes=1000), progress)
    assert set(seen) == {0}
    with pytest.raises(faults.ResourcesExhausted, match="the bundle of adapter 'a'"):
        build(deployment_of(tmp_path, "a"), replace(context, max_build_bytes=size + 10), Progress("a"))
    assert not list(context.store.list(""))
    build(deployment_of(tmp_path, "a"), replace(context, max_build_bytes=3 * size), Progress("a"))


def test_builds_share_the_disk(tmp_path):
    """Bytes that one build has announced and not written yet are not free for another, which gets the sums."""
    ledger = Ledger()
    third = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize // 3
    one, two = Space(tmp_path, ledger, None), Space(tmp_path, ledger, None)
    sums = (
        rf"two: {2 * third} bytes; with {2 * third} that running builds are about to write and {RESERVE_BYTES}"
    )
    with one.writing(2 * third, "one"), pytest.raises(faults.ResourcesExhausted, match=sums) as full:
        two.check(2 * third, "two")
    needed, has, missing = map(int, re.findall(r"needs (\d+) .* has (\d+)\. Free (\d+)", full.value.message)[0])
    assert (needed, missing) == (4 * third + RESERVE_BYTES, needed - has)
    two.check(third, "two")


class Flaky(MemoryStore):
    """Does not answer for a while."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def put(self, key: str, data: bytes | Path) -> None:
        if self.times:
            self.times -= 1
            raise faults.StoreUnavailable("the store is away")
        super().put(key, data)


def test_a_store_that_comes_back_is_waited_for(monkeypatch):
    """An operation is tried again with growing pauses, and fails with the store's own words after the last."""
    monkeypatch.setattr(patient, "time", time := OwnTime())
    store = PatientStore(Flaky(2), pauses_s=(1, 2))
    store.put("k", b"x")
    assert list(store.list("")) == ["k"]
    assert time.now_s == pytest.approx(3)
    with pytest.raises(faults.StoreUnavailable, match="the store is away"):
        PatientStore(Flaky(3), pauses_s=(1, 2)).put("k", b"x")


def test_waiting_for_a_store_can_be_stopped(monkeypatch):
    """A build that is cancelled does not wait for its store any longer."""
    progress = Progress(())

    class Cancelling(OwnTime):
        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            progress.stop(faults.BuildCancelled("enough"))

    monkeypatch.setattr(patient, "time", time := Cancelling())
    store = PatientStore(Flaky(10), progress.check, pauses_s=(3600.0,))
    with pytest.raises(faults.BuildCancelled, match="enough"):
        store.put("k", b"x")
    assert time.now_s < 1


def test_identities_are_kept_and_not_shared(tmp_path):
    """Living builders of one work folder differ; the next start of one has its identity again."""
    one, two = claim_identity(tmp_path), claim_identity(tmp_path)
    assert one.name != two.name
    one.file.close()
    again = claim_identity(tmp_path)
    assert again.name == one.name
    (tmp_path / "loramux-builder-2.id").write_text("cut of")
    assert len(claim_identity(tmp_path).name) == 16
    with pytest.raises(faults.ResourcesExhausted, match="Set LORAMUX_WORK_DIR to a folder"):
        replace(context_of(tmp_path), work_dir=tmp_path / "loramux-builder-2.id").place()
