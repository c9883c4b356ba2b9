"""Extensions: found through entry points, and never needed."""

import ast
import re
import tomllib
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

from loramux_shared.extensions import HTTP_ROUTES, find_extensions, load_extensions, package_of
from loramux_shared.faults import SettingsInvalid
from tests.support.root import ROOT


def test_entry_points_whose_package_is_gone_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Entry points that can be imported are loaded, by name; one that raises is left out by name."""
    site = tmp_path_factory.mktemp("site")
    info = site / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "zeta = others_package:command\nbeta = no_such_package.deep:it\nalpha = others_package:group\n"
    (info / "entry_points.txt").write_text(f"[loramux.of_a_test]\n{points}mu = raising\n")
    (site / "others_package.py").write_text("command, group = 1, 2\n")
    (site / "raising.py").write_text("raise OSError('no such driver')\n")
    monkeypatch.syspath_prepend(str(site))
    left: dict[str, SettingsInvalid] = {}
    found = load_extensions("loramux.of_a_test", left.__setitem__)
    assert list(found.items()) == [("alpha", 2), ("zeta", 1)]
    assert left["mu"].message.startswith("the extension 'mu' cannot be imported: OSError: no such driver. ")


COMES_WITH = {"pydantic-core": "pydantic", "typing-extensions": "pydantic", "botocore": "boto3"}
"""Packages that another one brings as a part of its interface."""
ROUTES = map(package_of, find_extensions(HTTP_ROUTES).values())
LOADED = dict.fromkeys(ROUTES, "builder,inference") | {
    "loramux": "cli",
    "loramux_shared": "builder",
    "builder_service": "builder",
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
