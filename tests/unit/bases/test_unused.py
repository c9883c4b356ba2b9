"""Tensors that a base does not use: parts that it may have besides, and others."""

from typing import Any

import pytest

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.read import read_fields
from loramux_shared.bases.unused import unknown
from tests.support.cases import cases


def base(architecture: str, model_type: str) -> ModelConfig:
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return read_fields(fields)


@pytest.mark.parametrize(("architecture", "model_type", "names"), cases(__file__, "KNOWN"))
def test_parts_beside_a_base_are_known(architecture: str, model_type: str, names: list[str]) -> None:
    """Towers, heads of other tasks, layers that predict further tokens, and buffers change no answer."""
    assert unknown(names, base(architecture, model_type)) == []


@pytest.mark.parametrize(("architecture", "model_type", "names"), cases(__file__, "UNKNOWN"))
def test_others_could_change_answers(architecture: str, model_type: str, names: list[str]) -> None:
    """A tensor that the model does not use, and is known not to need, is named."""
    assert unknown(names, base(architecture, model_type)) == sorted(names)
