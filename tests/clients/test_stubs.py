"""The examples in Go and Node, with stubs that are generated from the protos.

Run with ``--sweep``; a language whose tools are not installed is skipped. Go's packages are Debian's:
golang-google-grpc-dev, protoc-gen-go and protoc-gen-go-grpc.
"""

import importlib.resources
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc_tools import protoc

from tests.support.processes.up import run_up
from tests.support.root import ROOT

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(600)]
CLIENTS = ROOT / "examples" / "clients"
GO_PACKAGES = Path("/usr/share/gocode")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_up(tmp_path_factory.mktemp("stubs")) as served:
        yield served.grpc


def generate(*flags: str) -> None:
    """Generate stubs of the inference service, as docs/guides/other-languages.md says."""
    include = importlib.resources.files("grpc_tools") / "_proto"
    protos = sorted(str(path) for path in ROOT.glob("protos/loramux/inference/v1/*.proto"))
    assert protoc.main(["protoc", f"-I{ROOT / 'protos'}", f"-I{include}", *flags, *protos]) == 0


def run(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Run a command in a folder; returns its exit status, output and errors."""
    environment = os.environ | settings
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    return done.returncode, done.stdout, done.stderr


def needs(*commands: str) -> None:
    if lost := [name for name in commands if not shutil.which(name)]:
        pytest.skip(f"needs the command {lost[0]}")


def answers(folder: Path, *client: str) -> None:
    """Check that a client lists the models, streams an answer, and names the reason of a failure."""
    status, output, errors = run(folder, *client, "pirate")
    assert status == 0, errors
    assert "pirate" in output.splitlines()[3]
    assert "Arr" in output
    assert "43 tokens" in output
    status, _, errors = run(folder, *client, "nobody")
    assert status == 1
    assert "no model 'nobody'" in errors


def test_go(address: str, tmp_path: Path) -> None:
    """The client in Go is built from generated stubs, and works."""
    needs("go", "protoc-gen-go", "protoc-gen-go-grpc")
    source = tmp_path / "src"
    source.mkdir()
    generate(f"--go_out={source}", f"--go-grpc_out={source}")
    shutil.copytree(CLIENTS / "go", source / "client")
    go = {"GO111MODULE": "off", "GOPATH": f"{tmp_path}:{GO_PACKAGES}"}
    status, _, errors = run(source / "client", "go", "build", "-o", str(tmp_path / "client"), ".", **go)
    assert status == 0, errors
    answers(tmp_path, str(tmp_path / "client"), address)


def test_node(address: str, tmp_path: Path) -> None:
    """The client in Node works with generated stubs."""
    needs("node", "npm")
    folder = tmp_path / "node"
    shutil.copytree(CLIENTS / "node", folder)
    status, _, errors = run(folder, "npm", "install", "--no-audit", "--no-fund")
    assert status == 0, errors
    (folder / "gen").mkdir()
    plugin = folder / "node_modules" / ".bin" / "protoc-gen-es"
    generate(f"--plugin=protoc-gen-es={plugin}", f"--es_out={folder / 'gen'}", "--es_opt=target=js")
    answers(folder, "node", "client.js", f"http://{address}")
