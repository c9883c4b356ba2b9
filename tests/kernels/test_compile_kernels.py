"""``loramux kernels``: a start's kernels, compiled for a GPU on a machine without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.on_gpu.model import TINY, config_fields
from loramux.cli.exits import Exit
from loramux.cli.main import app
from tests.golden.kernels.sources import ENVIRONMENT


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The config of a small base, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(config_fields(TINY)))
    return tmp_path


def test_an_architecture_without_tiles_is_refused(base: Path) -> None:
    """The message names the known architectures and the requested one."""
    done = CliRunner().invoke(app, ["kernels", str(base), "--arch", "sm_75", "--out", str(base / "cache")])
    assert done.exit_code == Exit.USAGE
    assert "--arch is one of sm_80, sm_90, sm_100, sm_120, found 'sm_75'" in done.stderr


def test_the_interpreter_compiles_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for the interpreter are refused, with the variable to unset."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = CliRunner().invoke(app, ["kernels", str(base), "--arch", "sm_90", "--out", str(base / "cache")])
    assert done.exit_code == Exit.USAGE
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.sweep
def test_all_kernels_of_a_start_are_compiled_once(base: Path) -> None:
    """Machine code of every kernel is in the folder; a second run finds it there, and adds nothing."""
    cache = base / "cache"
    command = [
        str(Path(sys.executable).with_name("loramux")),
        "kernels",
        str(base),
        "--arch",
        "sm_90",
        "--out",
        str(cache),
    ]
    runs = []
    for _ in range(2):
        done = subprocess.run([*command, "--json"], env=ENVIRONMENT, capture_output=True, text=True, check=True)
        files = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}
        runs.append((json.loads(done.stdout)["kernels"], files))
    kernels, files = runs[0]
    assert runs[1] == runs[0]
    assert {"shrink_kernel", "rope_write_update_kernel", "attend_kernel", "race_kernel"} <= kernels.keys()
    assert kernels.keys() == {name.removesuffix(".cubin") for name in files}
