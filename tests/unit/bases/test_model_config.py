"""The reader of a checkpoint's ``config.json``: reads it as transformers does, or refuses it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.faults import CheckpointInvalid
from tests.support.adapters import BASE_CONFIG
from tests.support.cases import cases
from tests.support.hub_configs import HUB_CONFIGS

GEMMA_4 = {"architectures": ["Gemma4ForCausalLM"]}
QWEN_35 = {"architectures": ["Qwen3_5ForCausalLM"]}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_older_configs_mean_what_transformers_takes_them_for(tmp_path: Path, name: str) -> None:
    """A config without defaults, and the same config as transformers writes it, are the same model."""
    _write_config(tmp_path, **HUB_CONFIGS[name])
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    for max_seq_len in (None, 8192):
        assert read_config(tmp_path, max_seq_len) == read_config(tmp_path / "full", max_seq_len)


@pytest.mark.parametrize(("change", "expected"), cases(__file__, "test_what_is_not_served_is_refused_by_name"))
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    unnamed = {"model_type": None} if "architectures" in change else {}
    _write_config(tmp_path, **HUB_CONFIGS["Llama-3.1"] | {"rope_scaling": None} | unnamed | change)
    with pytest.raises(CheckpointInvalid, match=expected):
        read_config(tmp_path)


def _write_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


REFUSED: list[tuple[str, dict[str, Any]]] = cases(__file__, "REFUSED")


@pytest.mark.parametrize(("word", "config"), REFUSED, ids=[next(iter(case[1])) for case in REFUSED])
def test_other_geometries_are_refused_by_name(word, config):
    """A base with experts, latent attention, recurrent or uneven layers is named, with the key that tells."""
    with pytest.raises(CheckpointInvalid, match=f"config.json: {next(iter(config))}.*{word}"):
        read_fields(BASE_CONFIG | config)


@pytest.mark.parametrize(
    "config",
    [
        {"num_local_experts": 0, "num_experts": None, "kv_lora_rank": None, "is_encoder_decoder": False},
        {"layer_types": ["full_attention", "full_attention"]},
        {"head_dim": None},
        {"text_config": {"hidden_size": 9}},
    ],
    ids=["counts", "layer_types", "head_dim", "text_config"],
)
def test_words_that_say_nothing(config):
    """Counts of zero, nulls, and the decoder of a model without images have no effect."""
    assert read_fields(BASE_CONFIG | config) == read_fields(BASE_CONFIG)


def test_the_text_decoder_of_a_model_with_images():
    """The sizes of a model with images are those of its text decoder, whatever stands beside it."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": BASE_CONFIG,
        "vision_config": {"hidden_size": 9},
        "hidden_size": 99,
    }
    dims = read_fields(config).dims
    assert (dims.hidden, dims.vocab) == (BASE_CONFIG["hidden_size"], BASE_CONFIG["vocab_size"])
    assert dims.head_dim == 256
    with pytest.raises(CheckpointInvalid, match=r"text_config: expected an object, found list"):
        read_fields(config | {"text_config": [1]})
