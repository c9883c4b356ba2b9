"""``python -m build``, and its wheel with each extra in an empty environment. A sweep: it needs an index."""

import os
import re
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

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
SERVE = """
import json, subprocess, sys, loramux
folder = sys.argv[2]
command = [sys.argv[1] + "/loramux", "up", folder + "/tiny.yaml", "--json", "--store=file://" + folder]
up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
try:
    document = ""
    for line in up.stdout:
        document += line
        if line.startswith("}"):
            break
    with loramux.Client(json.loads(document)["inference"]) as client:
        assert client.complete("wide", [5, 6, 7], max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
finally:
    up.terminate()
    up.wait()
"""
OFFLINE = """
import sys, loramux
with loramux.LLM(sys.argv[2] + "/tiny.yaml", store="file://" + sys.argv[2]) as llm:
    [answer] = llm.generate([[5, 6, 7]], "wide", max_tokens=4, ignore_eos=True)
    assert answer.usage.completion_tokens == 4
"""
ACTS = (
    {
        "": """
import loramux.faults
try:
    loramux.Client("127.0.0.1:1").complete("a", "b")
except loramux.faults.ServerUnavailable as fault:
    assert "127.0.0.1:1" in str(fault)
""",
        "cli": """
import json, subprocess, sys
command = [sys.argv[1] + "/loramux", "keys", "new", "--scope", "infer", "--json"]
assert json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["key"].startswith("lmx_")
""",
        "store": """
import sys
from loramux_shared.storage.open import open_store
store = open_store(f"file://{sys.argv[2]}/store")
store.put("a/b", b"c")
assert store.get("a/b") == b"c"
assert open_store("s3://bucket/prefix").uri == "s3://bucket/prefix"
""",
        "otel": """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
with TracerProvider().get_tracer("a").start_as_current_span("b") as span:
    assert span.get_span_context().is_valid
OTLPSpanExporter()
""",
        "gcs": "import google.auth.credentials, requests; google.auth.credentials.AnonymousCredentials()",
        "azure": """
from azure.storage.blob import ContainerClient
assert ContainerClient("https://a.blob.core.windows.net", "b").container_name == "b"
""",
        "signing": """
import sys
from pathlib import Path
from loramux_shared.signatures import SigningKey; from loramux_signing.folder import verify_folder
assert verify_folder; from loramux_signing.openssf import public_key, sign_folder
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
folder, key = Path(sys.argv[2]) / "wide", Path(sys.argv[2]) / "key.pem"
form_of_key = form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()
key.write_bytes(generate_private_key(SECP256R1()).private_bytes(*form_of_key))
(key.parent / "model.sig").write_bytes(sign_folder(folder, SigningKey(key)))
verify_folder(folder, key.parent / "model.sig", [public_key(SigningKey(key))])
""",
        "builder": """
import subprocess, sys
command = [sys.argv[1] + "/loramux", "check", sys.argv[2] + "/wide", "--base", sys.argv[2] + "/base"]
assert "accepted" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
""",
        "doctor": """
import json, subprocess, sys
command = [sys.argv[1] + "/loramux", "doctor", "--json"]
assert "diagnosis" in json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
""",
        "fleet": """
import loramux.faults
try:
    loramux.Client(["127.0.0.1:1", "127.0.0.1:2"]).complete("a", "b")
except loramux.faults.ServerUnavailable as fault:
    assert "none of 2 replicas" in str(fault)
""",
        "docs": "import mkdocs.__main__, material; mkdocs.__main__.cli(['--version'])",
    }
    | dict.fromkeys(NEEDS_TORCH, SERVE)
    | {"offline": OFFLINE}
)
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
        commands = PROJECT["entry-points"]["loramux.commands"].items()
        for name in ("serve", *(name for name, place in commands if place.startswith(own))):
            assert "Usage" in run(python.parent / "loramux", name, "--help")
    run(python, "-I", "-c", act_of(extra), python.parent, world.root)
