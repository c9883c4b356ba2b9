"""A package outside of the tree, installed into a folder of its own, adds to ports, and is used end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.root import ROOT

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "loramux-parrot"
version = "1.0"
[project.entry-points."loramux.ports"]
"family.parrot" = "parrot:FAMILY"
"command.parrot" = "parrot:COMMAND"
"tool_format.parrot" = "parrot_calls:FORMAT"
[tool.hatch.build.targets.wheel]
only-include = ["parrot.py", "parrot_calls.py"]
"""
PARROT = '''
"""A family whose layers have a block of its own, and a command."""
from dataclasses import dataclass, replace
from loramux.cli import shell
from loramux_shared.bases.family import Architecture, Family, llama_like
from loramux_shared.bases.layers import MlpLayer

@dataclass(frozen=True)
class ParrotLayer(MlpLayer):
    """An MLP that doubles what it returns."""

def read(config):
    model = llama_like(config)
    mlp = ParrotLayer(model.dims.intermediate)
    return replace(model, layers=tuple(replace(layer, mlp=mlp) for layer in model.layers))

def blocks():
    from inference_service.engine.models.blocks import MlpBlock
    class ParrotBlock:
        def __init__(self, reader, spec):
            self._mlp = MlpBlock.of_layer(reader)
        def __call__(self, step, x):
            return 2 * self._mlp(step, x)
    return {ParrotLayer: ParrotBlock}

FAMILY = Family((Architecture("ParrotForCausalLM", "parrot"),), read, models="Parrots", blocks=blocks)

@shell.command
def parrot() -> None:
    """Say what parrots say."""
    shell.show("Pieces of eight!")

COMMAND = shell.Command(parrot)
'''
CALLS = '''
"""Calls between squawks."""
from dataclasses import replace
from inference_service.api.chat.formats.reading import TemplateMarks
from inference_service.api.chat.formats.tagged import HERMES

def blocks(calls):
    return {"<squawk>": HERMES.blocks(calls)["<tool_call>"]}

FORMAT = replace(HERMES, parser="parrot", shown_by=(TemplateMarks(("<squawk>",)),), blocks=blocks)
'''
READ = """
from inference_service.api.chat.dialect import Dialect, parsers_of
from inference_service.api.chat.request import AnswerCalls
parsers = parsers_of("{{ messages[0].content }}<squawk>")
reading = Dialect(parsers.tool, parsers.reasoning).reading(AnswerCalls({"find": {}}), None)
text = '<squawk>{"name": "find", "arguments": {}}</tool_call>'
print(parsers.tool, [type(part).__name__ for part in (*reading.push(text), *reading.finish())])
"""
LOGITS = """
import sys, torch
from pathlib import Path
from loramux_shared.bases.read import read_config
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder
folder = Path(sys.argv[1])
config = read_config(folder)
model = Decoder(config, Checkpoint(folder, torch.float32, torch.device("cpu")))
print(type(config.layers[0].mlp).__name__, sorted({type(layer.mlp).__name__ for layer in model._layers}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package is installed."""
    package = tmp_path_factory.mktemp("parrot")
    (package / "pyproject.toml").write_text(PYPROJECT)
    (package / "parrot.py").write_text(PARROT)
    (package / "parrot_calls.py").write_text(CALLS)
    into = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", into, package], check=True, capture_output=True)
    return into


def run(site: Path, *words: str) -> str:
    """Run Python with this tree and the folder; return its output."""
    places = (str(site), str(ROOT), str(ROOT / "shared"))
    code = f"import sys; sys.path[:0] = {places!r}; exec(sys.argv.pop(1))"
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_family_of_another_package_is_served(site: Path, tmp_path: Path) -> None:
    """The config is read as the family says, and layers have the blocks that it brings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    named = {"architectures": ["ParrotForCausalLM"], "model_type": "parrot"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    assert run(site, LOGITS, str(tmp_path)) == "ParrotLayer ['ParrotBlock']\n"


def test_calls_in_the_form_of_another_package_are_read(site: Path) -> None:
    """A template shows the form by a mark, and what it writes are calls."""
    assert run(site, READ).startswith("parrot ['CallBegun'")


def test_a_command_of_another_package_is_there(site: Path) -> None:
    """The command stands among the others, and runs."""
    main = "from loramux.cli.main import main; main()"
    assert "parrot  " in run(site, main, "--help")
    assert run(site, main, "parrot") == "Pieces of eight!\n"
