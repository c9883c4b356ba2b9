"""The demo's files: the README shows the content of the repository."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import safe_open

from loramux_shared.deployment_file import load_deployment
from tests.support.root import ROOT

EXAMPLES = ROOT / "examples"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
STATED = {  # name: rank, target modules, data type, rsLoRA
    "pirate": (16, {"q_proj", "v_proj"}, "F16", False),
    "bard": (2, ATTENTION | {"gate_proj", "up_proj", "down_proj"}, "F32", False),
    "json": (8, ATTENTION, "BF16", True),
}
HELD_OUT = ("capital of France", "make tea", "sky blue")


def script(name: str) -> ModuleType:
    """Import an example, which is a script and no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def config_of(name: str) -> dict[str, Any]:
    """Read PEFT's config of an adapter."""
    config: dict[str, Any] = json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text())
    return config


def test_deployment_names_adapters_that_exist() -> None:
    """The deployment file loads without an ignored key and points at the three adapters beside it."""
    file = load_deployment(EXAMPLES / "deployment.yaml")
    build = file.deployment.build
    assert file.ignored == ()
    assert file.deployment.model_name == "smollm2-demo"
    assert file.deployment.served_model_name == "SmolLM2-135M-Instruct"
    assert set(build.lora_adapters) == set(STATED)
    assert Path(build.checkpoint_repository.repo) == (
        Path("~/.cache/loramux/models/SmolLM2-135M-Instruct").expanduser().resolve()
    )
    for name, repository in build.lora_adapters.items():
        assert Path(repository.repo) == EXAMPLES / "adapters" / name
        assert config_of(name)["r"] <= build.lora_configuration.max_lora_rank


@pytest.mark.parametrize("name", STATED)
def test_adapter_is_a_standard_repository(name: str) -> None:
    """An adapter has PEFT's files and a card, is small enough for the repository, and names its base."""
    folder = EXAMPLES / "adapters" / name
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    assert config_of(name)["peft_type"] == "LORA"
    assert config_of(name)["base_model_name_or_path"] == BASE
    assert (folder / "README.md").read_text().startswith(f"---\nbase_model: {BASE}\n")


@pytest.mark.parametrize("name", STATED)
def test_adapter_is_as_stated(name: str) -> None:
    """Rank, target modules, data type and scaling, in the config and in the tensors themselves."""
    rank, modules, dtype, use_rslora = STATED[name]
    config = config_of(name)
    assert (config["r"], set(config["target_modules"]), config["use_rslora"]) == (rank, modules, use_rslora)
    with safe_open(EXAMPLES / "adapters" / name / "adapter_model.safetensors", framework="np") as tensors:
        keys = list(tensors.keys())
        slices = {key: tensors.get_slice(key) for key in keys}
        assert len(keys) == 30 * len(modules) * 2  # layers, modules, A and B
        for key, part in slices.items():
            assert part.get_dtype() == dtype
            match = re.fullmatch(
                r"base_model\.model\.model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight", key
            )
            assert match[1] in modules
            assert part.get_shape()[0 if match[2] == "A" else 1] == rank


def test_adapters_differ() -> None:
    """The demo shows mixed ranks, modules and data types in one batch, so no two adapters agree in any."""
    ranks, modules, dtypes, rslora = zip(*STATED.values(), strict=True)
    assert len(set(ranks)) == len({frozenset(m) for m in modules}) == len(set(dtypes)) == 3
    assert "BF16" in dtypes
    assert sum(rslora) == 1


@pytest.mark.parametrize("name", STATED)
def test_data_is_valid(name: str) -> None:
    """Each line is one question and answer; no question comes twice or is one that shows the effect."""
    lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    assert 12 <= len(pairs) <= 40
    assert all(set(pair) == {"question", "answer"} and all(pair.values()) for pair in pairs)
    questions = {pair["question"] for pair in pairs}
    assert len(questions) == len(pairs)
    assert not [q for q in questions for held_out in HELD_OUT if held_out in q]


def test_json_answers_are_json() -> None:
    """Every answer in the JSON voice is one object with a topic and an answer."""
    for line in (EXAMPLES / "data" / "json.jsonl").read_text(encoding="utf-8").splitlines():
        assert list(json.loads(json.loads(line)["answer"])) == ["topic", "answer"]


def test_rows_of_a_head_are_put_back_into_halves() -> None:
    """GGUF stores a head's rows as rotary pairs; the reading reverts the converter of llama.cpp exactly."""
    pytest.importorskip("gguf")
    import numpy as np

    prepare_base = script("prepare_base")
    weight = np.arange(3 * 8 * 5).reshape(3 * 8, 5)
    pairs = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(weight.shape)
    assert (prepare_base.halves_of_interleaved(pairs, heads=3) == weight).all()


def test_base_is_complete_only_with_every_file(tmp_path: Path) -> None:
    """Half a checkpoint, truncated weights or broken JSON are made again; a complete one is left alone."""
    pytest.importorskip("gguf")
    import numpy as np

    prepare_base = script("prepare_base")
    for name in prepare_base.FILES:
        (tmp_path / name).write_text("{}")
    weights = tmp_path / "model.safetensors"
    prepare_base.write_safetensors(weights, {"a": np.zeros((2, 3), np.uint16)})
    assert prepare_base.is_complete(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not prepare_base.is_complete(tmp_path)
    prepare_base.write_safetensors(weights, {"a": np.zeros((2, 3), np.uint16)})
    (tmp_path / "config.json").write_text("{")
    assert not prepare_base.is_complete(tmp_path)


def test_base_is_not_written_over_other_files(tmp_path: Path) -> None:
    """A directory with files of someone else is refused, never emptied."""
    pytest.importorskip("gguf")
    prepare_base = script("prepare_base")
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(prepare_base.BaseUnavailable, match=r"thesis\.txt"):
        prepare_base.refuse_other_files(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
