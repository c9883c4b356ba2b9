"""A client with nothing but its own dependencies, as old as they may be."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest
from hatchling.builders.wheel import WheelBuilder

from inference_service.kernels.cpu import compiling
from tests.support.fake_services import WORDS, Fakes
from tests.support.root import ROOT

OLDEST = ROOT / ".venv/oldest"
"""Filled by `make`, from support/oldest.txt."""
ASK = """
import json, sys
import google.protobuf, grpc, pathlib
import loramux
for name in loramux.__all__:
    getattr(loramux, name)
with loramux.Client(inference=sys.argv[1]) as client:
    events = list(client.generate("lora1", "hello"))
text = "".join(event.text for event in events if isinstance(event, loramux.Delta))
adapters = len(loramux.load_deployment(pathlib.Path(sys.argv[2])).deployment.build.lora_adapters)
print(json.dumps([google.protobuf.__version__, grpc.__version__, text, adapters]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path with the wheel and the oldest dependencies; run with -S, which leaves this environment out."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patched:  # a client needs no compiled operations
        patched.setattr(compiling, "compile_beforehand", lambda _: [])
        [built] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return f"{built}:{OLDEST}"


def _run(path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=False)


def test_a_stream_beside_protobuf_6(alone: str, fakes: Fakes, deployment: Callable[..., str]) -> None:
    """A client's imports are installed, an answer streams, and a deployment file is read."""
    file = deployment("support", "one")
    done = _run(alone, "-c", ASK, fakes.inference_address, file)
    assert done.returncode == 0, done.stderr
    protobuf, grpc, text, adapters = json.loads(done.stdout)
    assert (protobuf, grpc) == ("6.30.0", "1.72.1")
    assert text.startswith("".join(WORDS))
    assert adapters == 1


def test_the_command_line_says_which_extra_it_needs(alone: str) -> None:
    """The command line is not part of a client: its absence is a sentence, and no traceback."""
    done = _run(alone, "-c", "from loramux.cli.entry import main; main()")
    assert done.returncode == 1
    assert re.fullmatch(r"loramux: the command line needs \w+, .*pip install 'loramux\[cli\]'\n", done.stderr)


def test_the_oldest_are_those_that_the_project_names() -> None:
    """Each dependency of a client is tried at its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {part[0]: part[1] for each in project["dependencies"] if (part := re.split(">=|,", each))}
    lines = (ROOT / "tests/support/oldest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert tried.keys() == floors.keys()
    assert all(tried[name].startswith(floor) for name, floor in floors.items())
