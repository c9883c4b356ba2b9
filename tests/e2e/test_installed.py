"""``python -m build``, and its wheel with each extra in an empty environment. A sweep: it needs an index."""

from __future__ import annotations

import os
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

from tests.support.root import ROOT

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(900)]
TORCH = "INSTALL_TORCH"
"""Variable with which the extras that bring torch, some GB, are installed too."""
NEEDS_TORCH = {"inference", "gpu", "ray", "vllm_grpc", "demo", "train", "trl", "test"}
COMMANDS = {
    "store": "import loramux_shared.storage.s3",
    "otel": "import opentelemetry.sdk.trace",
} | dict.fromkeys(("gcs", "azure", "signing"), "import loramux")
"""What an extra is tried with, where it does not bring the command line."""
EXTRAS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def run(*command: str | Path) -> str:
    """Run a command outside the repository; it must succeed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAMUX_"))
    }
    done = subprocess.run(
        [*map(str, command)], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment_in(folder: Path) -> Path:
    """Make an empty environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist, as a release does."""
    folder = tmp_path_factory.mktemp("dist")
    python = environment_in(folder / "venv")
    run(python, "-m", "pip", "install", "--quiet", "build")
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT)
    return folder / "dist"


def test_a_release_has_an_sdist_and_a_wheel(distributions: Path) -> None:
    """Both have the version of the project."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    names = {path.name for path in distributions.iterdir()}
    assert f"loramux-{version}.tar.gz" in names
    assert len([name for name in names if name.startswith(f"loramux-{version}-py3-none-")]) == 1


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_a_wheel_works_in_an_empty_environment(extra: str, distributions: Path, tmp_path: Path) -> None:
    """The extra installs and works: the client alone, the command line, or the packages of a source."""
    if extra in NEEDS_TORCH and TORCH not in os.environ:
        pytest.skip(f"{TORCH}=1 installs torch too")
    [wheel] = distributions.glob("*.whl")
    python = environment_in(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]" if extra else wheel)
    run(python, "-m", "pip", "check")
    if (python.parent / "loramux").exists() and extra not in ("", *COMMANDS, "docs"):
        assert "doctor" in run(python.parent / "loramux", "--help")
    else:
        run(python, "-c", COMMANDS.get(extra, "import loramux; loramux.Client().close()"))
