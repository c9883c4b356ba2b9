"""A package outside of the tree, installed into a folder of its own, adds to ports, and is used end to end."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from tests.support.root import ROOT
from tests.support.tiny import SIZES, make_adapter, make_checkpoint, oracle, oracle_tokens

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
"source.parrot" = "parrot_source:SOURCE"
"adapter_kind.parrot" = "parrot_kind:KIND"
"weight_format.parrot" = "parrot_weights:FORMAT"
[tool.hatch.build.targets.wheel]
only-include = ["parrot.py", "parrot_calls.py", "parrot_source.py", "parrot_kind.py", "parrot_weights.py"]
"""
PARROT = '''
"""A family whose layers have a block of its own, and a command."""
from dataclasses import dataclass, replace
from loramux.cli.late import Command
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

def command():
    """Say what parrots say."""
    from loramux.cli import shell

    @shell.command
    def parrot() -> None:
        """Say what parrots say."""
        shell.show("Pieces of eight!")

    return parrot

COMMAND = Command(command)
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
SOURCE = '''
"""Cages in a folder, which the environment names."""
import os
from pathlib import Path
from loramux_shared.sources.base import SourceFile
from loramux_shared.sources.bucket import BucketSource
from loramux_shared.sources.entries import SourceEntry

class Cages:
    def __init__(self, root):
        self._root = root
    def list(self, prefix):
        for path in filter(Path.is_file, self._root.rglob("*")):
            if (name := path.relative_to(self._root).as_posix()).startswith(prefix):
                yield name, SourceFile(path.stat().st_size)
    def read(self, key, version):
        yield (self._root / key).read_bytes()
    def close(self):
        pass

def open_cages(repository, secrets):
    return Cages(Path(os.environ["PARROT_CAGES"])), repository.repo.removeprefix("parrot://")

SOURCE = SourceEntry("parrot://", lambda settings: BucketSource(open_cages, settings.secrets))
'''
KIND = '''
"""Wings: A, and half of B."""
from builder_service.domain.derived import Product
from builder_service.domain.peft_kinds.kind import Pairs, PeftKind, Side, are_products, itself

def make(parts, _inputs):
    a, b = parts["wing_a"], parts["wing_b"]
    if not are_products((b, a)):
        return None
    return itself(a), Side((b.shape[0], b.shape[1]), Product((b.name,), lambda b: 2 * b))

KIND = PeftKind("PARROT", own_fields=("colour",), default_rank=4, pairs=Pairs(("wing_a", "wing_b"), make))
'''
WEIGHTS = '''
"""Feathers: integers of a byte, and the size of all of them."""
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme

def read(config):
    return Quantization("parrot", (WeightScheme("feathers"),))

def layouts():
    import torch
    from inference_service.engine.models.packed import PackedLayout
    class Feathers:
        turned, matrices = False, 1
        def __init__(self, pieces):
            self.pieces = pieces
            self.rows, self.columns = pieces.matrix()
            self.scheme = pieces.scheme("feathers", [1, 1], self.rows, self.columns)
            self._feathers = pieces.take("weight_feathers", (torch.int8,), pieces.shape)
            self._size = pieces.take("weight_size", (torch.float32,), (1,))
        def part(self, matrix, begin, end):
            return self._feathers[begin:end].float() * self._size
    return [PackedLayout(("weight_feathers",), Feathers, frozenset({"weight_size"}))]

FORMAT = WeightFormat("parrot", ("parrot",), "feathers", read, layouts)
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
print(type(config.layers[0].mlp).__name__, sorted({type(layer.mlp).__name__ for layer in model.layers}))
"""
SERVE = """
import json, os, sys
from pathlib import Path
from loramux_shared.spelling import parse_repository
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import World, run_engine
prompt, root, base, *words = sys.argv[1:]
os.environ["PARROT_CAGES"] = root
world, store = World(Path(root, base), {}, Path(root)), MemoryStore()
adapters = {word.rpartition("/")[2]: parse_repository(word).model_dump(mode="json") for word in words}
world.build_with(store, build={"lora_adapters": adapters})
answers = run_engine(world.load(store), [(name, json.loads(prompt)) for name in ("base", *adapters)], 8)
print(json.dumps(dict(zip(("base", *adapters), answers))))
"""
DEPLOY = """
import sys
from loramux_shared.deployment import Runtime
print(Runtime(tool_parser="parrot").tool_parser, "inference_service" in sys.modules)
"""

PROMPT = [5, 9, 2, 40]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package is installed."""
    package = tmp_path_factory.mktemp("parrot")
    (package / "pyproject.toml").write_text(PYPROJECT)
    (package / "parrot.py").write_text(PARROT)
    (package / "parrot_calls.py").write_text(CALLS)
    (package / "parrot_source.py").write_text(SOURCE)
    (package / "parrot_kind.py").write_text(KIND)
    (package / "parrot_weights.py").write_text(WEIGHTS)
    into = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", into, package], check=True, capture_output=True)
    return into


@pytest.fixture(scope="module")
def cages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of LoRA: by themselves, and as feathers and wings."""
    root = tmp_path_factory.mktemp("cages")
    make_checkpoint(root / "whole", LlamaConfig(**SIZES))
    make_adapter(root / "whole", root / "lora", 1, r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    rewrite(root / "whole", root / "whole", on_a_grid, {})
    rewrite(root / "whole", root / "feathers", as_feathers, {"quantization_config": {"quant_method": "parrot"}})
    rewrite(root / "lora", root / "wings", as_wings, {"peft_type": "PARROT", "colour": "green"})
    return root


Tensors = dict[str, Tensor]
SIZE = 2.0**-5
"""The step of the grid on which weights of linears lie."""


def rewrite(folder: Path, into: Path, change: Callable[[str, Tensor], Tensors], fields: dict[str, Any]) -> None:
    """Write a folder with other tensors, and with further fields in its config."""
    if into != folder:
        shutil.copytree(folder, into)
    file = next(into.glob("*.safetensors"))
    tensors = {
        name: tensor for old, whole in load_file(file).items() for name, tensor in change(old, whole).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    config = next(
        path for path in into.glob("*config.json") if "generation" not in path.name and "tok" not in path.name
    )
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


def on_a_grid(name: str, whole: Tensor) -> Tensors:
    """Return weights of linears that a byte can hold, as they are."""
    return {name: (whole / SIZE).round().clamp(-127, 127) * SIZE if "_proj" in name else whole}


def as_feathers(name: str, whole: Tensor) -> Tensors:
    """Return the weights of linears as feathers."""
    if "_proj" not in name:
        return {name: whole}
    return {f"{name}_feathers": (whole / SIZE).to(torch.int8), f"{name}_size": torch.tensor([SIZE])}


def as_wings(name: str, whole: Tensor) -> Tensors:
    """Return A and B as wings."""
    if "lora_A" in name:
        return {name.replace("lora_A.weight", "wing_a"): whole}
    return {name.replace("lora_B.weight", "wing_b"): whole / 2}


def run(site: Path, *words: str) -> str:
    """Run Python with this tree and the folder; return its output."""
    places = (str(site), str(ROOT), str(ROOT / "shared"))
    code = f"import sys; sys.path[:0] = {places!r}; exec(sys.argv.pop(1))"
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served(site: Path, cages: Path) -> dict[str, list[int]]:
    """The tokens of the base of feathers, of the adapter of LoRA in a folder, and of wings in a cage."""
    output = run(site, SERVE, json.dumps(PROMPT), str(cages), "feathers", f"{cages}/lora", "parrot://wings")
    return json.loads(output.splitlines()[-1])  # behind the logs


def test_a_family_of_another_package_is_served(site: Path, tmp_path: Path) -> None:
    """The config is read as the family says, and layers have the blocks that it brings."""
    from transformers import LlamaForCausalLM

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


def test_a_deployment_names_a_format_of_another_package(site: Path) -> None:
    """The name is known by the entry point alone: a builder imports nothing of the format."""
    assert run(site, DEPLOY) == "parrot False\n"


def test_sources_and_kinds_of_another_package_are_built(served: dict[str, list[int]]) -> None:
    """An adapter of another kind, from an address, answers as the same LoRA of a folder does."""
    assert served["wings"] == served["lora"] != served["base"]


def test_weights_in_the_format_of_another_package_are_served(served: dict[str, list[int]], cages: Path) -> None:
    """A base of feathers answers as the one whose weights they are."""
    assert served["base"] == oracle_tokens(oracle(cages / "whole", None), PROMPT, len(served["base"]))


def test_a_command_of_another_package_is_there(site: Path) -> None:
    """The command stands among the others, and runs."""
    main = "from loramux.cli.main import main; main()"
    assert "parrot  " in run(site, main, "--help")
    assert run(site, main, "parrot") == "Pieces of eight!\n"
