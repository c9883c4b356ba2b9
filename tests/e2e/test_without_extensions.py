"""The tree without the folder of extensions: nothing in the core needs one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.root import ROOT

PACKAGES = [path.name for path in ROOT.glob("extensions/*/loramux_*")]
MODULES = [f"tests.{path.stem}" for path in ROOT.glob("extensions/*/tests/*.py")]
IMPORTS = re.compile(
    rf"^ *(?:from|import) (?:{'|'.join(map(re.escape, [*PACKAGES, *MODULES]))})\b", re.MULTILINE
)
pytestmark = pytest.mark.skipif(not PACKAGES, reason="they are gone already")
LEFT_OUT = ("extensions", ".*", "__pycache__", "artifacts")
RUN = """
import sys
root, here, code, *sys.argv[1:] = sys.argv[1:]
own = lambda path: path in ("", root, f"{root}/shared") or path.startswith(f"{root}/extensions/")
sys.path[:] = [here, f"{here}/shared", *(path for path in sys.path if not own(path))]
exec(code)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree, without them."""
    copy: Path = tmp_path_factory.mktemp("without") / "tree"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), ignore_dangling_symlinks=True)
    return copy


def run(tree: Path, code: str, *words: str, status: int = 0) -> str:
    """Run code in the copy, where packages of this tree are not found; return its output."""
    command = [sys.executable, "-c", RUN, str(ROOT), str(tree), code, *words]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_no_file_of_the_core_imports_an_extension(tree: Path) -> None:
    """The core, its tests and their support import no extension; a benchmark may do so at run time."""
    assert MODULES
    files = [path for path in tree.rglob("*.py") if path.parts[len(tree.parts)] != "benchmarks"]
    assert len(files) > 500  # the core is there
    assert not [path for path in files if IMPORTS.search(path.read_text())]


def test_the_command_line_has_all_other_commands(tree: Path) -> None:
    """Commands that only the metadata of the installation still name are left out."""
    commands = run(tree, "from loramux.cli.main import main; main()", "--help")
    assert "  serve  " in commands
    assert "  envoy  " not in commands


def test_what_needs_an_extension_says_so(tree: Path) -> None:
    """Signatures that settings require are refused without what makes and verifies them."""
    signer = "sigstore:https://issuer.example.com#me"
    required = f"""
from pathlib import Path
from builder_service.builder import _store
from inference_service.store import open_replica_store
from loramux_shared.faults import SettingsInvalid
from loramux_shared.settings import BuilderSettings, InferenceSettings
signer = ("{signer}",)
replica = InferenceSettings(deployment="d", store="file:///tmp", require_signature=signer)
builder = BuilderSettings(store="file:///tmp", require_signature=signer, signing_key=Path("key"))
for open_it, settings in ((open_replica_store, replica), (_store, builder)):
    try:
        open_it(settings)
    except SettingsInvalid as fault:
        print(fault)
"""
    assert run(tree, required).count("expected an installed package that brings signatures, found none") == 2


def test_a_deployment_is_built_unless_it_asks_for_proofs(tree: Path, tmp_path: Path) -> None:
    """A builder without a prover builds what needs none, and refuses the rest."""
    builds = """
from pathlib import Path
from loramux_shared.faults import SettingsInvalid
from tests.support.adapters import write_adapter, write_base
from tests.support.folders import context_of, deployment_of, run_build
folder = Path(sys.argv[1])
write_base(folder / "base")
write_adapter(folder / "one")
print("built", *run_build(deployment_of(folder, "one"), context_of(folder)).generation.adapters)
try:
    run_build(deployment_of(folder, "one", prove=True), context_of(folder))
except SettingsInvalid as fault:
    print(fault)
"""
    output = run(tree, builds, str(tmp_path))
    assert "built one\n" in output
    assert "a deployment with prove: true: expected an installed package that brings prover" in output


def test_its_import_contracts_hold(tree: Path) -> None:
    """The import contracts name installed packages only."""
    assert "0 broken" in run(
        tree, "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"
    )


@pytest.mark.sweep
def test_all_tests_of_the_core_are_collected(tree: Path) -> None:
    """The test modules of the core import nothing of an extension."""
    run(tree, "import pytest; sys.exit(pytest.main())", "--collect-only", "-q", "tests")
