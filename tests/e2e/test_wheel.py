"""The wheel: what it installs, under which names."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from tests.support.root import ROOT

OURS = {"loramux", "loramux_shared", "builder_service", "inference_service", "ray_service"}
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


def test_a_wheel_stays_out_of_other_projects_way(tmp_path: Path) -> None:
    """A wheel has five packages with every module and no `shared`, they import nothing that it does not have,
    and those that need no torch are imported beside another project's `shared`."""
    [built] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0] for name in names} == OURS
    roots = [(ROOT / "shared" if top == "loramux_shared" else ROOT, top) for top in OURS]
    sources = {path: str(path.relative_to(root)) for root, top in roots for path in (root / top).rglob("*.py")}
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
