"""The folder in which a replica caches a base: damages, and the next start."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loramux_shared.adapter_files import pieces_of
from loramux_shared.bundle.generation import BaseRecord
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import BundleCorrupt, Fault, ResourcesExhausted
from loramux_shared.process import SOCKETS, working_folder
from loramux_shared.sources import files
from loramux_shared.sources.checkpoint import describe_base, fetch_base
from loramux_shared.sources.hub import HubSource
from loramux_shared.sources.open import Sources
from loramux_shared.sources.retry import RetryPolicy
from loramux_shared.sources.secrets import Secrets
from tests.support.adapters import write_base
from tests.support.hub import Hub, HubRepo, serve_hub
from tests.support.waiting import BOUND_S

QUICK = RetryPolicy(attempts=2, wait_s=0.01)


class Remote:
    """A base somewhere else, and how to fetch it."""

    def __init__(self, sources: Sources, repository: Repository) -> None:
        self.sources = sources
        self.record: BaseRecord = describe_base(sources, repository).record

    def fetch(self, cache: Path) -> Path:
        return fetch_base(self.record, cache, self.sources)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as hub:
        yield hub


@pytest.fixture
def remote(hub: Hub, tmp_path: Path) -> Remote:
    """A base on a hub; extensions/clouds/tests repeats the tests with a bucket, which other code caches."""
    contents = {path.name: path.read_bytes() for path in write_base(tmp_path / "base").iterdir()}
    hub.repos["org/base"] = HubRepo({"main": "c" * 40}, contents, lfs=("model.safetensors",))
    source = HubSource(Secrets(None, {}), endpoint=hub.endpoint, patience=QUICK)
    return Remote(Sources({SourceKind.HF: source}), Repository(source="HF", repo="org/base"))


def in_place_of(make: Callable[[Path], object], name: str = "config.json") -> Callable[[Path], object]:
    """Put something else where a file belongs."""

    def spoil(folder: Path) -> object:
        (folder / name).unlink()
        return make(folder / name)

    return spoil


def folder_with_a_file(path: Path) -> None:
    """Make the folder of a container engine for a mount that does not exist."""
    path.mkdir()
    (path / "file").write_text("")


SPOILS: dict[str, Callable[[Path], object]] = {
    "a folder": in_place_of(folder_with_a_file),
    "a link to itself": in_place_of(lambda path: path.symlink_to(path.name)),
    "a link to nothing": in_place_of(lambda path: path.symlink_to("/nowhere/x")),
    "a pipe": in_place_of(os.mkfifo),
    "half a file": in_place_of(lambda path: path.write_bytes(b"x")),
    "other bytes": in_place_of(lambda path: path.write_bytes(bytes(2144)), "model.safetensors"),
    "a file instead of the folder": lambda folder: [shutil.rmtree(folder), folder.write_text("")],
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_start_heals_its_cache(remote: Remote, tmp_path: Path, spoil: str) -> None:
    """Anything in a file's place is removed, and the file is fetched again, in one start."""
    folder = remote.fetch(tmp_path / "cache")
    SPOILS[spoil](folder)
    assert remote.fetch(tmp_path / "cache") == folder
    for name, expected in remote.record.files.items():
        assert (folder / name).stat().st_size == expected.size


def test_nothing_outside_the_cache_is_removed(remote: Remote, tmp_path: Path) -> None:
    """A damaged file behind a link out of the cache is named, and stays; a link to a good file may stay too."""
    folder = remote.fetch(tmp_path / "cache")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    remote.fetch(tmp_path / "cache")
    assert (folder / "config.json").is_symlink()
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    (outside / "model.safetensors").write_bytes(bytes(2144))
    with pytest.raises(BundleCorrupt, match=r"model.safetensors: expected sha256"):
        remote.fetch(tmp_path / "cache")
    assert (outside / "model.safetensors").read_bytes() == bytes(2144)


def test_a_cache_that_is_no_folder_is_named(remote: Remote, tmp_path: Path) -> None:
    """A file in place of the whole cache is RESOURCES_EXHAUSTED, and stays."""
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(ResourcesExhausted, match="Remove the file or folder in its place; the log names it"):
        remote.fetch(tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "mine"


def test_what_killed_replicas_left_is_swept(remote: Remote, tmp_path: Path) -> None:
    """A start removes parts without a write for a day, and leaves those of a living replica."""
    folder = remote.fetch(tmp_path / "cache")
    old, young = folder / ".part-old", folder / ".part-young"
    for part in (old, young):
        part.write_text("")
    copies = tmp_path / "cache" / "loramux-build-scratch-old"
    copies.mkdir()
    (copies / "config.json").write_text("{}")
    for left in (old, copies):
        os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    remote.fetch(tmp_path / "cache")
    assert (old.exists(), copies.exists(), young.exists()) == (False, False, True)


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of a process that runs, or that was made a moment ago, stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young, other = (tmp_path / name for name in (f"{SOCKETS}left", f"{SOCKETS}young", "other"))
    for each in (left, young, other):
        each.mkdir()
    with working_folder(SOCKETS) as used:
        for each in (left, other, used):
            os.utime(each, (0, 0))
        with working_folder(SOCKETS) as second:
            assert {*tmp_path.iterdir()} == {young, other, used, second}
    assert {*tmp_path.iterdir()} == {young, other}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_another_replica_takes_away(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A file that is removed between a look and the reading, to be fetched again, is read again."""
    folder = remote.fetch(tmp_path / "cache")
    taken: list[Path] = []

    def late(path: Path) -> Iterator[bytes]:
        if path.name == name and not taken:
            path.unlink()
            taken.append(path)
        return pieces_of(path)

    monkeypatch.setattr(files, "pieces_of", late)
    assert remote.fetch(tmp_path / "cache") == folder
    assert taken == [folder / name]


def test_replicas_that_start_together_share_a_cache(remote: Remote, tmp_path: Path) -> None:
    """Each of four replicas that begin with a cache in which every file is damaged ends with a whole base."""
    folder = remote.fetch(tmp_path / "cache")
    for name in remote.record.files:
        (folder / name).write_bytes(bytes(remote.record.files[name].size))
    ended: list[Path | Fault] = []

    def start() -> None:
        try:
            ended.append(remote.fetch(tmp_path / "cache"))
        except Fault as fault:
            ended.append(fault)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(BOUND_S)
    assert ended == [folder] * 4
    assert remote.fetch(tmp_path / "cache") == folder
