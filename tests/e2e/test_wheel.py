"""The wheel: what it installs, under which names."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.root import ROOT

IMPORT_ALL = """
import importlib, pkgutil, sys
import shared
assert shared.OURS == "another project's", shared.__file__
for top in sys.argv[2:]:
    for module in pkgutil.walk_packages([f"{sys.argv[1]}/{top}"], f"{top}.", onerror=print):
        if not module.name.endswith("__main__"):
            assert importlib.import_module(module.name).__file__.startswith(sys.argv[1]), module.name
            print(module.name)
"""


def test_a_wheel_stays_out_of_other_projects_way(tmp_path: Path) -> None:
    """It installs five packages and no `shared`; every module works beside another project that has one."""
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    assert tops == {"loramux", "loramux_shared", "builder_service", "inference_service", "ray_service"}
    other = tmp_path / "other" / "shared"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('OURS = "another project\'s"\n')
    imported = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, tmp_path / "site", *sorted(tops)],
        env={"PYTHONPATH": f"{other.parent}:{tmp_path / 'site'}", "TRITON_INTERPRET": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert imported.returncode == 0, imported.stderr
    sources = {
        str(path.relative_to(root).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for root, top in ((ROOT / "shared" if top == "loramux_shared" else ROOT, top) for top in tops)
        for path in (root / top).rglob("*.py")
        if path.name != "__main__.py"
    }
    assert sources - tops <= set(imported.stdout.split())
