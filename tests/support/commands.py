"""The `loramux` commands that files name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def assert_takes(name: str, arguments: Sequence[str]) -> None:
    """A command exists, and takes the flags among these arguments."""
    said = subprocess.run(
        [Path(sys.executable).with_name("loramux"), name, "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert said.returncode == 0, said.stderr
    assert all(flag in said.stdout for flag in arguments if flag.startswith("--"))
