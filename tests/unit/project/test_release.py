"""The release and the site: existing files are built, and only a tag publishes, with attestations."""

import json
import os
import re
import shutil
import subprocess
import sys
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


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the site before it is built."""
    pages = tmp_path_factory.mktemp("site") / "pages"
    site.collect(pages)
    return pages


@pytest.fixture(scope="module")
def plain(collected: Path) -> Path:
    """The Markdown of the site, and its llms.txt."""
    folder = collected.parent / "plain"
    site.write_plain(collected, folder)
    return folder


def test_pages_and_what_they_point_to_are_collected(collected: Path) -> None:
    """Pages keep their paths of the repository, so links work; notes have an index."""
    for page in (ROOT / "docs").rglob("*.md"):
        assert (collected / page.relative_to(ROOT)).read_text() == page.read_text()
    assert (collected / "docs/images/page.webp").exists()
    notes = (collected / "docs/decisions/index.md").read_text()
    assert all(f"({note.name})" in notes for note in (ROOT / "docs/decisions").glob("*.md"))


def test_the_navigation_has_every_page(collected: Path) -> None:
    """Every page is in the navigation once, except decision notes, which have a list, and nothing else is."""
    named = [name for _, names in site.navigation() for name in names]
    notes = {note for note in collected.glob("docs/decisions/*.md") if note.name != "index.md"}
    pages = {str(page.relative_to(collected)) for page in {*collected.rglob("*.md")} - notes}
    assert sorted(named) == sorted({*pages, site.OPENAPI})


def test_every_page_is_there_for_programs(collected: Path, plain: Path) -> None:
    """A page's Markdown has the URL of its HTML with .md behind, and each link leads to what the site has."""
    static = {path.relative_to(collected) for path in collected.rglob("*") if path.suffix != ".md"}
    made = {path.relative_to(plain) for path in plain.rglob("*") if path.is_file()}
    assert len(made) == len([*collected.rglob("*.md")]) + 1
    assert {"index.html.md", "docs/start/cpu.html.md", "extensions/bench/index.html.md"} <= {*map(str, made)}
    for path in made:
        links = site.LINK.findall((plain / path).read_text())
        reached = {Path(os.path.normpath(path.parent / link)) for link in links}
        assert reached <= {*made, *static}, path


def test_llms_txt_lists_the_pages(collected: Path, plain: Path) -> None:
    """The list has llmstxt.org's form: a title, what loramux is, and sections of links with a line each."""
    title, _, quoted, _, *lines = (plain / site.LLMS).read_text().splitlines()
    assert title == "# loramux"
    assert quoted.startswith("> One base model, hundreds of LoRA adapters")
    sections = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert sections == [name for name, _ in site.navigation()]
    links = [line for line in lines if line and not line.startswith("## ")]
    assert all(re.fullmatch(r"- \[[^]]+\]\([^)]+\): \S.{10,250}", line) for line in links)
    assert "- [Quickstart on a CPU](docs/start/cpu.html.md): You get a small real model" in "\n".join(links)
    assert json.loads((collected / site.OPENAPI).read_text())["paths"]["/v1/chat/completions"]


@pytest.mark.sweep
def test_the_site_is_built(tmp_path: Path) -> None:
    """MkDocs finds no link that leads nowhere, and each of its pages is there for programs."""
    pytest.importorskip("material", reason="the site is an extra: pip install 'loramux[docs]'")
    command = [sys.executable, "-m", "scripts.site", "--folder", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {*(tmp_path / "site").rglob("*.html")} - {tmp_path / "site" / "404.html"}
    assert made
    assert all(page.with_name(f"{page.name}.md").exists() for page in made)
    assert (tmp_path / "site" / site.OPENAPI).exists()
