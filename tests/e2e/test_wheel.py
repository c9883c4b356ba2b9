"""The wheel: its files and their names."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

import hatch_build
from hatch_build import REPOSITORY_URL, CompiledOperations, Links
from inference_service.engine.kernels.cpu import compiling
from inference_service.engine.kernels.cpu.build import load
from inference_service.engine.kernels.cpu.compiling import kinds_of_machine, kinds_that_run
from loramux_shared.pages import begin_of_pages
from tests.support.native import as_in_a_wheel
from tests.support.root import ROOT

CORE = ("loramux", "shared/loramux_shared", "builder_service", "inference_service")
PACKAGES = {path.name: path for path in (*map(ROOT.joinpath, CORE), *ROOT.glob("extensions/*/loramux_*"))}
OURS = set(PACKAGES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_INSTALLED = {path.name for path in ROOT.iterdir() if path.is_dir()} - OURS
IMPORT = """
import importlib, pkgutil, sys
import shared
assert shared.OURS == "another project's", shared.__file__
for top in ("loramux", "loramux_shared", "builder_service"):
    for module in pkgutil.walk_packages([f"{sys.argv[1]}/{top}"], f"{top}.", onerror=print):
        if not module.name.endswith("__main__"):
            assert importlib.import_module(module.name).__file__.startswith(sys.argv[1]), module.name
"""


@pytest.fixture
def built(tmp_path: Path, beforehand: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, with operations that were compiled once for all tests."""

    def copied(into: Path, _: Callable[[str], None], machine: str) -> list[Path]:
        shutil.copytree(beforehand, into)
        return [compiling.place(into, kind) for kind in kinds_of_machine(machine)]

    as_in_a_wheel(monkeypatch)
    monkeypatch.setattr(compiling, "compile_beforehand", copied)
    return wheel(tmp_path)


def wheel(into: Path) -> Path:
    [path] = WheelBuilder(str(ROOT)).build(directory=str(into), versions=["standard"])
    return Path(path)


@pytest.mark.sweep
def test_a_wheel_has_the_operations_of_every_kind_of_processor(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start without a compiler runs the wheel's operations; its tag is this system's, for any Python 3."""
    _, _, _, tags = parse_wheel_filename(built.name)
    assert tags & set(sys_tags())
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    assert not any(tag.platform == "any" for tag in tags)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site]
    subprocess.run([*map(str, command), str(built)], check=True)
    inside = site / "inference_service/engine/kernels/cpu" / compiling.BEFOREHAND
    assert {path.name.split("-")[1] for path in inside.iterdir()} == {kind.name for kind in kinds_of_machine()}
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    how = load(tmp_path / "native", inside).how
    assert how == f"compiled beforehand for {kinds_that_run()[0].name}"


def test_without_a_compiler_a_wheel_is_pure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An installation does not fail for it: the client and the builder need none."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert wheel(tmp_path).name.endswith("-py3-none-any.whl")
    output = "".join(capfd.readouterr())
    assert "no compiled operations (no C++ compiler" in output


def test_an_editable_installation_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable installation leaves compilation to the first start after a change of the source."""
    monkeypatch.setattr(compiling, "compile_beforehand", lambda *_: pytest.fail("it does"))
    data: dict[str, object] = {}
    CompiledOperations(str(ROOT), {}, None, None, str(tmp_path), "wheel").initialize("editable", data)
    assert not data


def test_pip_gets_the_metadata_of_a_wheel_without_compiling(built: Path, tmp_path: Path) -> None:
    """The metadata that pip asks for before it builds a wheel are those of the wheel."""
    ask = "import sys, hatch_build as it; print(it.prepare_metadata_for_build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", ask, tmp_path],
        env={"PIP_BUILD_TRACKER": str(tmp_path), "PATH": ""},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    with zipfile.ZipFile(built) as archive:
        of_wheel = archive.read(f"{done.stdout.strip()}/METADATA").decode()
    assert (tmp_path / done.stdout.strip() / "METADATA").read_text() == of_wheel
    assert PROJECT["build-system"]["build-backend"] == hatch_build.__name__


def test_a_release_names_its_repository_and_its_links_lead_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links of the README, and pages in messages, are URLs of the release's tag; elsewhere they are paths."""
    fields: dict[str, Any] = {"version": "1.2.3"}
    links = Links(str(ROOT), {})
    links.update(local := dict(fields))
    assert local["readme"]["text"] == (ROOT / "README.md").read_text()
    assert local["urls"] == {}
    monkeypatch.setenv(REPOSITORY_URL, "https://git.example/us/loramux")
    links.update(released := dict(fields))
    targets = re.findall(r"\]\(([^)]*)\)", released["readme"]["text"])
    assert all(target.startswith("https://") for target in targets)
    assert "https://git.example/us/loramux/blob/v1.2.3/docs/index.md" in targets
    assert "https://git.example/us/loramux/raw/v1.2.3/docs/images/page.webp" in targets
    urls = "".join(f"Project-URL: {label}, {url}\n" for label, url in released["urls"].items())
    assert begin_of_pages(f"Name: loramux\n{urls}") == "https://git.example/us/loramux/blob/v1.2.3/"
    assert begin_of_pages("Name: loramux\n") == ""


def test_a_wheel_has_no_large_files(built: Path) -> None:
    """The adapters of the demo stay in the sources; libraries alone are large."""
    with zipfile.ZipFile(built) as archive:
        large = {each.filename: each.file_size for each in archive.infolist() if each.file_size > 200_000}
    assert {Path(name).suffix for name in large} <= {".so"}


def test_a_wheel_stays_out_of_other_projects_way(built: Path, tmp_path: Path) -> None:
    """A wheel has every module and no `shared`, and is imported beside another project's `shared`."""
    with zipfile.ZipFile(built) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0] for name in names} == OURS
    sources = {
        path: str(path.relative_to(top.parent)) for top in PACKAGES.values() for path in top.rglob("*.py")
    }
    assert set(sources.values()) <= names
    for path in sources:
        imported = re.findall(r"^ *(?:from (\w+)[\w.]* import|import (\w+))", path.read_text(), re.M)
        assert not NOT_INSTALLED & {first or second for first, second in imported}, path
    other = tmp_path / "other" / "shared"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('OURS = "another project\'s"\n')
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, tmp_path / "site"],
        env={"PYTHONPATH": f"{other.parent}:{tmp_path / 'site'}"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
