"""The demo's files: adapters as PEFT saves them, and the base that a script makes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.support.root import ROOT

EXAMPLES = ROOT / "examples"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS = ("pirate", "bard", "json")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text())
    return config


@pytest.mark.parametrize("name", ADAPTERS)
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


@pytest.fixture
def prepare_base() -> ModuleType:
    """The script that makes the demo's base."""
    pytest.importorskip("gguf")
    return script("prepare_base")


def test_rows_of_a_head_are_put_back_into_halves(prepare_base: ModuleType) -> None:
    """GGUF stores a head's rows as rotary pairs; the reading reverts the converter of llama.cpp exactly."""
    weight = np.arange(3 * 8 * 5).reshape(3 * 8, 5)
    pairs = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(weight.shape)
    assert (prepare_base.halves_of_interleaved(pairs, heads=3) == weight).all()


def test_base_is_complete_only_with_every_file(tmp_path: Path, prepare_base: ModuleType) -> None:
    """Half a checkpoint, truncated weights or broken JSON are made again; a complete one is left alone."""
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


def test_base_is_not_written_over_other_files(tmp_path: Path, prepare_base: ModuleType) -> None:
    """A folder with other files is refused, and they stay."""
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(prepare_base.BaseUnavailable, match=r"thesis\.txt"):
        prepare_base.refuse_other_files(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
