"""The folders that services may read which a command starts."""

from __future__ import annotations

from pathlib import Path

from loramux.cli.local.preflight import UpPlan
from loramux.cli.local.services import local_roots
from loramux_shared.deployment import Build, Deployment, Repository, SourceKind


def test_a_snapshot_of_the_hubs_cache_is_read_with_its_blobs(tmp_path: Path) -> None:
    """The files of a snapshot are links out of its folder; of others they alone are allowed."""
    model, plain = tmp_path / "models--org--base", tmp_path / "snapshots" / "plain"
    for folder in (snapshot := model / "snapshots" / "abc", model / "blobs", plain):
        folder.mkdir(parents=True)
    local = [Repository(source=SourceKind.LOCAL, repo=str(folder)) for folder in (snapshot, plain, snapshot)]
    hub = Repository(source=SourceKind.HF, repo="org/other")
    assert local_roots([*local, hub]) == [snapshot, plain, model / "blobs"]


def test_up_reads_beside_its_file_and_below_its_roots(tmp_path: Path) -> None:
    """Only files that the deployment names are read outside its file's folder and those of --local-root."""
    base, one = (Repository(source=SourceKind.LOCAL, repo=str(tmp_path / each)) for each in ("base", "a/one"))
    deployment = Deployment(model_name="m", build=Build(checkpoint_repository=base, lora_adapters={"1": one}))
    roots = [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
    plan = UpPlan(deployment, "file:///none", "127.0.0.1:1", "127.0.0.1:2", roots=roots)
    assert plan.local_roots == [tmp_path / "base", tmp_path / "a", tmp_path / "b"]
