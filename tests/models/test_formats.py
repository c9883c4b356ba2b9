"""Weights of few bits are widened to what the format's own library says, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from inference_service.models.checkpoint import Checkpoint
from loramux_shared.bases.formats.read import read_quantization

WRITTEN = Path(__file__).parents[1] / "golden" / "formats"
CPU = torch.device("cpu")


def described(config: dict[str, Any]) -> Any:
    """How weights are kept, as a base's config says it."""
    return read_quantization({"quantization_config": config}, architecture="LlamaForCausalLM")


def checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], dtype: torch.dtype
) -> Checkpoint:
    """A checkpoint of these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint(folder, dtype, CPU, quantization=described(config))


def read_written(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The config, the tensors and the widened weight of a file of `tests/golden/formats`."""
    with safe_open(WRITTEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        config = json.loads(file.metadata()["config"])
    [widened] = [tensors.pop(key) for key in list(tensors) if key.startswith("widened.")]
    return config, tensors, widened


@pytest.mark.parametrize("name", sorted(path.stem for path in WRITTEN.glob("*.safetensors")))
def test_a_weight_is_what_its_library_says(tmp_path: Path, name: str) -> None:
    """In the type in which that library widens it."""
    config, tensors, widened = read_written(name)
    found = checkpoint(tmp_path, tensors, config, widened.dtype).get("layer.weight", tuple(widened.shape))
    assert found.dtype == widened.dtype
    assert torch.equal(found, widened)
