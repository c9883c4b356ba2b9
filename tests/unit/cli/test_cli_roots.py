"""What services that a command starts may read."""

from __future__ import annotations

from pathlib import Path

from loramux.cli.roots import local_roots
from loramux_shared.deployment import Repository, SourceKind


def test_a_snapshot_of_the_hubs_cache_is_read_with_its_blobs(tmp_path: Path) -> None:
    """The files of a snapshot are links out of its folder; of others they alone are allowed."""
    model, plain = tmp_path / "models--org--base", tmp_path / "snapshots" / "plain"
    for folder in (snapshot := model / "snapshots" / "abc", model / "blobs", plain):
        folder.mkdir(parents=True)
    local = [Repository(source=SourceKind.LOCAL, repo=str(folder)) for folder in (snapshot, plain, snapshot)]
    hub = Repository(source=SourceKind.HF, repo="org/other")
    assert local_roots([*local, hub]) == [snapshot, plain, model / "blobs"]
