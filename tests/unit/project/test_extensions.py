"""Ports: entries of other packages are found through entry points, and never needed."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

from loramux_shared.faults import SettingsInvalid
from loramux_shared.ports import GROUP, entry_of, registered, required
from tests.support.root import ROOT


def test_entries_of_a_port_are_found_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Entries of the port's type are found; what raises or is something else is refused, or left out."""
    site = tmp_path_factory.mktemp("site")
    info = site / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = (
        "dish.zeta = others_package:one\ndish.beta = no_such_package.deep:it\ndish.alpha = others_package:two\n"
    )
    points += "dish.mu = raising\ndish.nu = others_package\ncup.xi = others_package:one\ndish.pi = lacking\n"
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}")
    (site / "others_package.py").write_text("one, two = 1, 2\n")
    (site / "raising.py").write_text("raise OSError('no such driver')\n")
    (site / "lacking.py").write_text("import no_such_driver\n")
    monkeypatch.syspath_prepend(str(site))
    left: dict[str, SettingsInvalid] = {}
    assert list(registered("dish", int, left.__setitem__).items()) == [("alpha", 2), ("zeta", 1)]
    assert left["mu"].message.startswith("the extension 'mu' cannot be imported: OSError: no such driver. ")
    assert left["nu"].message.startswith("the extension 'nu': expected a int, found module. ")
    needs = "the extension 'pi' needs packages that are not installed here (no_such_driver): install them, "
    assert left["pi"].message.startswith(needs)
    assert entry_of("dish", "zeta", int) == 1
    assert entry_of("dish", "beta", int) is None
    with pytest.raises(SettingsInvalid, match="'mu' cannot be imported"):
        registered("dish", int)
    with pytest.raises(SettingsInvalid, match="that brings plate, found none"):
        required("plate", int, "supper")


PORTS_OF_A_BUILDER = ("adapter_kind", "family", "weight_format")
LOADS_OF_PORTS = """
import builder_service.builder
from builder_service.domain.kinds import load_kinds
from loramux_shared.bases.families import load_families
from loramux_shared.bases.formats import load_formats
from loramux_shared.faults import SettingsInvalid

for load in (load_kinds, load_families, load_formats):
    try:
        load()
    except SettingsInvalid as fault:
        print(fault.message)
"""


def test_a_broken_package_is_named_where_its_entry_is_asked_for(tmp_path: Path) -> None:
    """A builder is imported without it, and loading the entries of its ports names the package."""
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "".join(f"{port}.mu = raising:entry\n" for port in PORTS_OF_A_BUILDER)
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}")
    (tmp_path / "raising.py").write_text("raise OSError('no such driver')\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "shared")))
    command = [sys.executable, "-c", LOADS_OF_PORTS]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    refusals = [line for line in done.stdout.splitlines() if "'mu' cannot be imported: OSError" in line]
    assert len(refusals) == len(PORTS_OF_A_BUILDER), done


BROKEN = '''
from loramux.cli.late import Command

def late():
    """Squawk."""
    import no_such_driver

LATE = Command(late)
'''


def test_a_command_that_cannot_be_imported_says_so_when_it_is_used(tmp_path: Path) -> None:
    """A package's entry that raises is not listed; either command ends with its reason, whatever its flags."""
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "command.mu = raising:entry\ncommand.pi = broken:LATE\n"
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{points}")
    (tmp_path / "raising.py").write_text("raise OSError('no such driver')\n")
    (tmp_path / "broken.py").write_text(BROKEN)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "shared")))

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "loramux.cli.main", *words]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    listed = run("--help")[1]
    assert "  pi  " in listed
    assert "  mu  " not in listed
    for name, why in (("mu", "cannot be imported: OSError"), ("pi", "needs packages that are not installed")):
        code, output = run(name, "--help", "x")
        assert code == 2, output
        assert f"error: SETTINGS_INVALID: the extension '{name}' {why}" in output


COMES_WITH = {
    "pydantic-core": "pydantic",
    "typing-extensions": "pydantic",
    "botocore": "boto3",
    "urllib3": "requests",
}
"""Packages that another one brings as a part of its interface."""
LOADED = {
    "loramux": "cli",
    "loramux_shared": "builder,gcs,azure,mlflow",
    "builder_service": "check",
    "inference_service": "inference,gpu",
    "loramux_batches": "batches",
}
"""Packages that a service loads, with the extras that must suffice."""


def declared(names: str) -> set[str]:
    """Return the packages that ``pip install loramux[names]`` names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = chain(project["dependencies"], *map(project["optional-dependencies"].get, names.split(",")))
    required = {re.split("[<>=]", each)[0] for each in found}
    return required.union(*(declared(each[8:-1]) for each in required if each.startswith("loramux[")))


def test_what_a_service_imports_is_declared() -> None:
    """No module that a service loads at its start comes through the dependencies of another package alone."""
    distributions = packages_distributions()
    for package, extras in LOADED.items():
        allowed, spec = {"loramux", *declared(extras)}, find_spec(package)
        for file in Path(spec.submodule_search_locations[0]).rglob("*.py") if spec else ():
            body = ast.parse(file.read_text()).body
            modules = [each.module for each in body if isinstance(each, ast.ImportFrom)]
            modules += [alias.name for each in body if isinstance(each, ast.Import) for alias in each.names]
            for name in {each.partition(".")[0] for each in modules} & distributions.keys():
                found = {each.lower().replace("_", "-") for each in distributions[name]}
                found |= {COMES_WITH[each] for each in found & COMES_WITH.keys()}
                assert found & allowed, f"{file} imports {name}"


def test_a_client_imports_no_more_than_it_needs() -> None:
    """A client is there without packages of the command line, of stores, and of files that it does not read."""
    code = "import sys; from loramux import Client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "grpc" in loaded
    assert not loaded & {"boto3", "huggingface_hub", "numpy", "rich", "structlog", "typer", "yaml"}
