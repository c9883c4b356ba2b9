"""The action of GitHub and the hook of pre-commit: their steps, run here as those hosts run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.adapters import tensors, write_adapter
from tests.support.root import ROOT

ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with an adapter that is fine, and one of a compiled model."""
    write_adapter(tmp_path / "fine")
    compiled = {f"_orig_mod.{name}": value for name, value in tensors().items()}
    write_adapter(tmp_path / "compiled", compiled, target_modules=["q_proj", "v_proj"])
    return tmp_path


def _checked(folder: Path, **inputs: str) -> subprocess.CompletedProcess[str]:
    """Run the step of the action that checks, with its inputs in the environment."""
    values = {name: each.get("default", "") for name, each in ACTION["inputs"].items()} | inputs
    step = next(step for step in ACTION["runs"]["steps"] if step["name"] == "Check")
    filled = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: values[found[1]], value)
        for name, value in step["env"].items()
    }
    argv = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    environment = os.environ | filled | {"PATH": PATH}
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_action_writes_a_file_and_fails(folder: Path) -> None:
    """Verdicts go into the output, and the step fails where a server is silently wrong."""
    done = _checked(folder, adapter="./compiled", format="sarif", output="out.sarif", **{"for": "vllm"})
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert '"uri": "compiled/adapter_config.json"' in (folder / "out.sarif").read_text()
    assert _checked(folder, adapter="./fine").returncode == 0


def test_the_hook_judges_each_folder_once(folder: Path) -> None:
    """The hook takes its servers and then the files that changed."""
    names = ["adapter_config.json", "adapter_model.safetensors"]
    changed = [f"{part}/{name}" for part in ("compiled", "fine") for name in names]
    assert all(re.search(HOOK["files"], name) for name in changed)
    argv = [*shlex.split(HOOK["entry"]), "vllm", *changed]
    done = subprocess.run(
        argv, cwd=folder, env=os.environ | {"PATH": PATH}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("vLLM  ") == 2
