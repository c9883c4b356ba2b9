"""The output of ``make demo`` while pip works."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.root import ROOT

MAKEFILE = ROOT / "Makefile"
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="no make here")


def dry_run(target: str, folder: Path, stderr: int) -> str:
    """Return the commands of make in an empty checkout."""
    (folder / "pyproject.toml").touch()
    command = [MAKE or "", "--dry-run", "-f", str(MAKEFILE), target]
    return subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True
    ).stdout


@pytest.mark.parametrize(("target", "count"), [("demo", 2), ("check", 4), ("site", 1)])
def test_a_silent_pip_is_announced(target: str, count: int, tmp_path: Path) -> None:
    """A pip without a terminal is silent: its download, the size and the reason of the silence are printed."""
    lines = dry_run(target, tmp_path, subprocess.DEVNULL).splitlines()
    pips = [place for place, line in enumerate(lines) if "/pip install" in line]
    assert len(pips) == count
    for place in pips:
        assert "--quiet" in lines[place]
        assert re.search(rf"of {count}: .* [MG]B.*without a terminal pip is silent", lines[place - 1])


@pytest.mark.parametrize(("target", "count"), [("demo", 2), ("check", 4)])
def test_a_terminal_sees_pips_own_bars(target: str, count: int, tmp_path: Path) -> None:
    """A terminal shows pip's progress bars, as no pip runs with --quiet."""
    parent, child = pty.openpty()
    try:
        stated = dry_run(target, tmp_path, child)
    finally:
        os.close(parent)
        os.close(child)
    assert stated.count("/pip install") == count
    assert "--quiet" not in stated
    assert "silent" not in stated
