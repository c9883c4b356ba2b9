"""The release workflow builds existing files, and only a tag publishes."""

from __future__ import annotations

import tomllib
from typing import Any

import yaml

from tests.support.root import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
PUBLISHES = ("docker push", "docker login", "gh-action-pypi-publish")


def jobs() -> dict[str, Any]:
    """Return the jobs of the workflow."""
    return dict(yaml.safe_load(WORKFLOW.read_text())["jobs"])


def test_both_images_are_built() -> None:
    """Each service of the matrix has its Dockerfile, and each Dockerfile its service."""
    services = jobs()["images"]["strategy"]["matrix"]["service"]
    assert {path.name for path in (ROOT / "deploy").glob("*.Dockerfile")} == {
        f"{name}.Dockerfile" for name in services
    }


def test_only_a_tag_publishes() -> None:
    """Each step that publishes, or its job, has the condition that the ref is a tag."""
    steps = [(job, step) for job in jobs().values() for step in job["steps"]]
    publishing = [
        (job, step)
        for job, step in steps
        if any(word in f"{step.get('run')}{step.get('uses')}" for word in PUBLISHES)
    ]
    assert len(publishing) == 2
    for job, step in publishing:
        assert "github.ref_type == 'tag'" in (step.get("if") or job.get("if"))


def test_the_tag_is_compared_with_the_version() -> None:
    """The line that the workflow looks for is how pyproject.toml writes the version."""
    text = (ROOT / "pyproject.toml").read_text()
    version = tomllib.loads(text)["project"]["version"]
    assert f'version = "{version}"' in text.splitlines()
    [check] = [step for step in jobs()["distributions"]["steps"] if "The tag" in step.get("name", "")]
    assert 'grep -qx "version = \\"${GITHUB_REF_NAME#v}\\"" pyproject.toml' in check["run"]
