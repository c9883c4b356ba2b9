"""The site: every page is in it, and a link that leads nowhere ends its build."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import site
from tests.support.root import ROOT


def test_pages_and_what_they_point_to_are_collected(tmp_path: Path) -> None:
    """Pages keep their paths of the repository, so links work; notes have an index."""
    site.collect(tmp_path)
    for page in (ROOT / "docs").rglob("*.md"):
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text()
    assert (tmp_path / "docs/images/page.webp").exists()
    notes = (tmp_path / "docs/decisions/index.md").read_text()
    assert all(f"({note.name})" in notes for note in (ROOT / "docs/decisions").glob("*.md"))


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """MkDocs builds the site in strict mode: every link and anchor exists (needs the extra `docs`)."""
    pytest.importorskip("material")
    command = [sys.executable, "-m", "scripts.site", "--folder", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site/docs/index.html").exists()
    assert (tmp_path / "site/search/search_index.json").exists()
