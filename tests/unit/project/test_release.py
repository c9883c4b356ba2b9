"""The release and the site: existing files are built, and only a tag publishes, with attestations."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import site
from tests.support.root import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
PUBLISHES = ("docker push", "docker login", "gh-action-pypi-publish", "actions/attest", "gh release")


def jobs() -> dict[str, Any]:
    return dict(yaml.safe_load(WORKFLOW.read_text())["jobs"])


def test_both_images_are_built() -> None:
    """The release builds the image of every Dockerfile."""
    services = jobs()["images"]["strategy"]["matrix"]["service"]
    assert {path.name for path in (ROOT / "deploy").glob("*.Dockerfile")} == {
        f"{name}.Dockerfile" for name in services
    }


def test_only_a_tag_publishes() -> None:
    """Every step that publishes runs for a tag alone."""
    steps = [(job, step) for job in jobs().values() for step in job["steps"]]
    publishing = [
        (job, step)
        for job, step in steps
        if any(word in f"{step.get('run')}{step.get('uses')}" for word in PUBLISHES)
    ]
    assert len(publishing) == 8
    for job, step in publishing:
        assert "github.ref_type == 'tag'" in (step.get("if") or job.get("if"))


def test_what_is_published_is_attested() -> None:
    """Images and distributions have their provenance and their bills of materials attested."""
    for job, published in (("images", None), ("publish", "gh-action-pypi-publish")):
        steps = jobs()[job]["steps"]
        attests = [step["with"] for step in steps if "actions/attest@" in step.get("uses", "")]
        assert {"sbom-path" in each for each in attests} == {False, True}
        if published:
            assert published in steps[-1]["uses"]


@pytest.mark.parametrize("digest", ["sha256:" + "a" * 64, "", "sha256:12"])
def test_base_images_get_a_registrys_digest(tmp_path: Path, digest: str) -> None:
    """Both stages of a Dockerfile name the digest, also after a second run, and no digest is refused."""
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\necho {digest}\n")
    docker.chmod(0o755)
    file = shutil.copy(ROOT / "deploy" / "builder.Dockerfile", tmp_path)
    before = Path(file).read_text()
    for _ in range(2):
        done = subprocess.run(
            [ROOT / "scripts/pins.sh", file],
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            check=False,
            capture_output=True,
            text=True,
        )
        pinned = Path(file).read_text()
        if len(digest) == 71:
            assert done.returncode == 0
            assert len(re.findall(rf"^FROM python:\S+@{digest}( |$)", pinned, re.M)) == 2
            assert re.sub(f"@{digest}", "", pinned) == re.sub(r"@sha256:\w+", "", before)
        else:
            assert done.returncode == 1
            assert "expected a digest" in done.stderr
            assert pinned == before


def test_the_tag_is_compared_with_the_version() -> None:
    """The line that the workflow looks for is how pyproject.toml writes the version."""
    text = (ROOT / "pyproject.toml").read_text()
    version = tomllib.loads(text)["project"]["version"]
    assert f'version = "{version}"' in text.splitlines()
    [check] = [step for step in jobs()["distributions"]["steps"] if "The tag" in step.get("name", "")]
    assert 'grep -qx "version = \\"${GITHUB_REF_NAME#v}\\"" pyproject.toml' in check["run"]


def test_pages_and_what_they_point_to_are_collected(tmp_path: Path) -> None:
    """Pages keep their paths of the repository, so links work; notes have an index."""
    site.collect(tmp_path)
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text()
    assert (tmp_path / "docs/images/page.webp").exists()
    notes = (tmp_path / "docs/decisions/index.md").read_text()
    assert all(f"({note.name})" in notes for note in (ROOT / "docs/decisions").glob("*.md"))
