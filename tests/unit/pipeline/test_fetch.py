from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from builder_service.pipeline.context import Ledger, Space
from builder_service.pipeline.fetch import FetchedAdapter, fetch_adapters
from builder_service.pipeline.progress import Progress, Stage
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import (
    Fault,
    RepoGated,
    RepoNotFound,
    ResourcesExhausted,
    SourceChanged,
    SourceRefused,
    SourceUnavailable,
)
from loramux_shared.sources.base import Progress as Counter, Resolved, SourceFile, unwatched
from loramux_shared.sources.files import content_digest
from loramux_shared.sources.open import Sources

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


def test_one_fault_is_said_with_its_adapter(tmp_path):
    """The fault of one adapter keeps its reason, and its adapter is marked."""
    source = FakeSource({"https://h/two": RepoNotFound("nothing")})
    with pytest.raises(RepoNotFound, match="adapter 'two': nothing") as failure:
        fetch(tmp_path, source, "one", "two")
    assert failure.value.__notes__ == [f"one=FETCHING,two={Stage.REFUSED.value}"]


def test_every_fault_is_said(tmp_path):
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
