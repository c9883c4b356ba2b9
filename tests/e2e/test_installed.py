"""``python -m build``, and its wheel with each extra in an empty environment. A sweep: it needs an index."""

import os
import re
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

from tests.support.cases import cases
from tests.support.root import ROOT
from tests.support.tiny import World, make_world

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1200)]
TORCH = "INSTALL_TORCH"
"""Variable with which the extras that bring torch, some GB, are installed too."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def brought(extra: str) -> list[str]:
    found = [re.match(r"loramux\[(.*?)\]", each) for each in EXTRAS[extra]]
    return [name for each in found if each for name in each[1].split(",")]


def brings(extra: str, name: str) -> bool:
    """Return whether an extra is one, or is made of it."""
    return extra == name or any(brings(each, name) for each in brought(extra))


NEEDS_TORCH = {extra for extra in EXTRAS if brings(extra, "inference")} | {"trl"}
PROGRAMS = {extra: "\n".join(lines) for extra, lines in cases(__file__, "acts").items()}
ACTS = dict.fromkeys(NEEDS_TORCH, PROGRAMS["inference"]) | {"builder": PROGRAMS["check"]} | PROGRAMS
"""What each extra is tried with: Python whose arguments are its bin/ and the folder of a tiny base."""


def act_of(extra: str) -> str:
    """Return what an extra is tried with; one without an act of its own, with that of what it is made of."""
    return ACTS[extra] if extra in ACTS else act_of(brought(extra)[-1])


WITH = {"signing": "cli,signing", "trl": "inference,trl"}
"""What an extra is installed with, where it only works beside another one."""
WITHOUT_COMMANDS = {"", *(extra for extra in EXTRAS if not brings(extra, "cli"))}


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Make a tiny base, adapters and a deployment file."""
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.root / "tiny.yaml").write_text(yaml.safe_dump(world.deployment().model_dump(mode="json")))
    return world


def test_a_release_has_an_sdist_and_a_wheel(distributions: Path) -> None:
    """The sdist and the wheel have the version of the project."""
    version = PROJECT["version"]
    names = {path.name for path in distributions.iterdir()}
    assert f"loramux-{version}.tar.gz" in names
    assert len([name for name in names if name.startswith(f"loramux-{version}-py3-none-")]) == 1


@pytest.mark.parametrize("extra", ["", *sorted(EXTRAS)])
def test_a_wheel_works_in_an_empty_environment(
    extra: str, distributions: Path, world: World, tmp_path: Path
) -> None:
    """The extra installs and works with no other package than its own, and so do its commands."""
    if extra in NEEDS_TORCH and TORCH not in os.environ:
        pytest.skip(f"{TORCH}=1 installs torch too")
    [wheel] = distributions.glob("*.whl")
    python = environment_in(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[{WITH.get(extra, extra)}]" if extra else wheel)
    run(python, "-m", "pip", "check")
    if extra not in WITHOUT_COMMANDS:
        own = f"loramux_{extra.replace('-', '_')}."
        added = [
            name for name, place in PROJECT["entry-points"]["loramux.ports"].items() if place.startswith(own)
        ]
        for name in ("serve", *(name[8:] for name in added if name.startswith("command."))):
            assert "Usage" in run(python.parent / "loramux", name, "--help")
    run(python, "-I", "-c", act_of(extra), python.parent, world.root)
