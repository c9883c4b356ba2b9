from __future__ import annotations

from typing import Any

import pytest

from loramux_shared.bases.read import read_fields
from loramux_shared.faults import CheckpointInvalid
from tests.support.adapters import BASE_CONFIG

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("MoE", {"num_local_experts": 8}),
    ("MoE", {"num_experts": 128, "moe_intermediate_size": 768}),
    ("MoE", {"n_routed_experts": 256}),
    ("MLA", {"kv_lora_rank": 512, "q_lora_rank": None}),
    ("hybrid", {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}),
    ("hybrid", {"layers_block_type": ["mamba", "attention"]}),
    ("hybrid", {"block_types": ["recurrent", "recurrent", "attention"]}),
    ("hybrid", {"attn_layer_period": 8, "mamba_d_state": 16}),
    ("hybrid", {"hybrid_override_pattern": "M-M-M*-"}),
    ("differ", {"block_configs": [{"ffn": {"ffn_mult": 1.3}}]}),
    ("differ", {"cross_attention_layers": [3, 8]}),
    ("differ", {"per_layer_config": {"1": {"num_key_value_heads": 1}}}),
    ("positive integer", {"num_key_value_heads": [4, 4]}),
    ("positive integer", {"intermediate_size": [8192, 16384]}),
    ("positive integer", {"head_dim": 2.5}),
    ("positive integer", {"head_dim": 0}),
    ("positive integer", {"hidden_size": True}),
    ("divisor of num_attention_heads 4", {"num_key_value_heads": 3}),
    ("at most 4096", {"num_hidden_layers": 10**9}),
    ("encoder-decoder", {"is_encoder_decoder": True}),
]


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
    assert (dims.hidden, dims.vocab, dims.head_dim) == (
        BASE_CONFIG["hidden_size"],
        BASE_CONFIG["vocab_size"],
        256,
    )
    with pytest.raises(CheckpointInvalid, match=r"text_config: expected an object, found list"):
        read_fields(config | {"text_config": [1]})
