"""Paths that people do not mean: bytes that are no UTF-8, a NUL, links to themselves, pipes and devices."""

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux.cli.local.services import builder_command
from loramux_shared import faults, sources
from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Repository, SourceKind
from loramux_shared.faults import Fault, SourceChanged, SourceRefused, StoreUnavailable
from loramux_shared.sources.files import whole
from loramux_shared.sources.local import LocalSource
from loramux_shared.sources.open import Sources, open_sources
from loramux_shared.storage.local import LocalStore
from tests.support.cases import cases
from tests.support.descriptors import cancel_after, expect_nothing_open, keep_fault
from tests.support.processes.commands import run

NO_TEXT = os.fsdecode(b"caf\xe9")


def local(folder: Path, **fields: str) -> Repository:
    """A folder as a repository, without the checks of a message."""
    return Repository.model_construct(source=SourceKind.LOCAL, revision="", **{"subfolder": "", **fields})


def read_all(folder: Path, **fields: str) -> list[str]:
    """List and read the content of a folder below another."""
    source = LocalSource([folder])
    resolved = source.resolve(local(folder, **fields))
    source.digests(resolved, resolved.files)
    return list(resolved.files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a link to itself, a pipe, a device, and a folder with a file."""
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("below", "subfolder", "kind"), cases(__file__, "test_a_folder_that_is_none_is_named"))
def test_a_folder_that_is_none_is_named(folder: Path, below: str, subfolder: str, kind: str) -> None:
    """A path that is no folder to read is refused with its source."""
    with pytest.raises(getattr(faults, kind), match="LOCAL"):
        read_all(folder, repo=f"{folder}/{below}", subfolder=subfolder)


def test_what_is_no_file_with_a_name_is_not_listed(folder: Path) -> None:
    """Links to themselves, pipes, devices and names that are no UTF-8 are not there for anyone."""
    (folder / NO_TEXT).write_text("")
    (folder / "file").write_text("")
    (folder / "zero").unlink()  # it leads outside
    assert read_all(folder, repo=str(folder)) == ["file", "one/file"]


@pytest.mark.parametrize("now", ["pipe", "loop", "one", "zero"])
def test_a_file_that_becomes_something_else_is_named(folder: Path, now: str) -> None:
    """A pipe, loop, folder or device in place of a listed file is refused at once, without a wait."""
    source = LocalSource([folder, Path("/dev")])
    (folder / "file").write_text("{}")
    resolved = source.resolve(local(folder, repo=str(folder)))
    (folder / "file").unlink()
    (folder / now).rename(folder / "file")
    with pytest.raises(Fault, match="LOCAL /"):
        source.digests(resolved, ["file"])
    with pytest.raises(Fault, match="LOCAL /"):
        source.fetch(resolved, ["file"], folder / "into")


def test_a_recorded_file_name_is_a_path(folder: Path) -> None:
    """A recorded name that is no path below the folder is refused."""
    for name in ("a\0b", "loop/x"):
        files = {name: FileDigest(size=1, sha256="0" * 64)}
        with pytest.raises(SourceRefused, match="not a path of this server"):
            LocalSource([folder]).place(local(folder, repo=str(folder)), files, folder)


@pytest.mark.parametrize("name", ["loop", "loop/x", "pipe", "one/file"])
def test_a_store_that_is_no_folder_is_named(folder: Path, name: str) -> None:
    """A store at a loop, a pipe or a file is STORE_UNAVAILABLE in every operation."""
    store = LocalStore(folder / name)
    calls: list[Callable[[], object]] = [lambda: list(store.list("")), lambda: store.put("a", b"")]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()


def test_a_store_lists_keys_and_nothing_else(tmp_path: Path) -> None:
    """Files whose names are no keys, because another client put them there, are not listed."""
    store = LocalStore(tmp_path)
    store.put("a/b", b"1")
    for name in (NO_TEXT, "new\nline"):
        (tmp_path / "a" / name).write_text("")
    assert [entry.key for entry in store.entries("")] == list(store.list("")) == ["a/b"]


@pytest.mark.parametrize("name", ["loop", "pipe", NO_TEXT])
@pytest.mark.parametrize("command", ["build", "check", "keys"])
def test_the_command_line_names_them(folder: Path, name: str, command: str) -> None:
    """No command of the CLI ends with a traceback for a wrong path."""
    (folder / NO_TEXT).mkdir()
    path, nobody = str(folder / name), ["--builder", "127.0.0.1:1"]
    deployment = folder / "deployment.yaml"
    deployment.write_text("build: {checkpoint_repository: {source: LOCAL, repo: ./one}}")
    arguments = {
        "build": ["build", str(deployment) if name == "pipe" else path, *nobody],
        "check": ["check", path, "--base", str(folder / "one"), *nobody],
        "keys": ["keys", "list", "--file", f"{path}/x"],
    }[command]
    status, text, errors = run(*arguments)
    assert status in {1, 2, 3}
    assert "INTERNAL" not in text + errors
    assert "Traceback" not in text + errors
    assert builder_command(None, "127.0.0.1:0", [folder / name])[-1] == path


def test_a_local_file_that_changes_is_reported(tmp_path: Path) -> None:
    """A LOCAL file that was written after the listing is SOURCE_CHANGED."""
    file = Path(tmp_path / "a")
    file.write_bytes(b"one")
    local = LocalSource([tmp_path])
    resolved = local.resolve(Repository(source=SourceKind.LOCAL, repo=str(tmp_path)))
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    with pytest.raises(SourceChanged, match="changed since it was listed"):
        local.fetch(resolved, ["a"], tmp_path / "into")
    assert not (tmp_path / "into" / "a").exists()


def test_nothing_of_a_folder_stays_open(tmp_path: Path) -> None:
    """Files whose reading was cancelled, or that changed, are closed though failures are kept."""
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    local = LocalSource([tmp_path])
    resolved = local.resolve(Repository(source=SourceKind.LOCAL, repo=str(tmp_path)))
    with expect_nothing_open() as retained:
        keep_fault(lambda: local.fetch(resolved, ["file"], tmp_path / "into", cancel_after(1 << 20)), retained)
        keep_fault(lambda: local.digests(resolved, ["file"], cancel_after(1 << 20)), retained)
        (tmp_path / "file").write_bytes(bytes(4 << 20))
        keep_fault(lambda: local.digests(resolved, ["file"]), retained)


def test_what_is_missing_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsupported kind, and a kind with missing packages, are refused with the cure."""
    repository = Repository(source=SourceKind.S3, repo="s3://bucket/one")
    with pytest.raises(SourceRefused, match="source S3 is not supported here; supported: LOCAL"):
        Sources({SourceKind.LOCAL: LocalSource([])}).of(repository)

    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "loramux_shared.sources.s3", raising=False)
    monkeypatch.delattr(sources, "s3", raising=False)
    with pytest.raises(SourceRefused) as refusal:
        open_sources().of(repository)
    text = "source S3 needs packages that are not installed here (boto3): pip install 'loramux[builder]'"
    assert str(refusal.value) == text
    assert refusal.value.repository == "s3://bucket/one"


def test_a_file_that_does_not_fit_the_disk_is_named(tmp_path: Path) -> None:
    """Bytes that wait to be written when it is closed do not fit either; nothing of it stays."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most[1]))
    try:
        with pytest.raises(faults.ResourcesExhausted), whole(tmp_path / "a") as sink:
            sink.writelines([bytes(1 << 20), b"a"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert not list(tmp_path.iterdir())
