"""The reader of a checkpoint's ``config.json``: reads it as transformers does, or refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.faults import CheckpointInvalid
from tests.support.adapters import BASE_CONFIG
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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM is not supported; supported: .*Qwen3"),
        ({"architectures": ["CohereForCausalLM"]}, "CohereForCausalLM is not supported"),
        ({"architectures": ["GlmForCausalLM"], "hidden_size": None}, "GlmForCausalLM is not supported"),
        ({"architectures": ["OlmoForCausalLM"], "num_local_experts": 8}, "OlmoForCausalLM is not supported"),
        ({"architectures": None}, "architecture unknown"),
        (
            {"model_type": "mistral"},
            "LlamaForCausalLM, whose model_type is 'llama', and model_type is 'mistral'",
        ),
        ({"hidden_act": "relu"}, 'hidden_act "relu" is not supported for LlamaForCausalLM; supported: "silu"'),
        ({"rope_scaling": {"rope_type": "axial"}}, "'axial' is not supported; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor: expected a number, found None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "quant_method 'hqq'"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token or a list of tokens, found '</s>'"),
        ({"sliding_window": 4096}, "sliding_window 4096 is not supported for LlamaForCausalLM"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types .* not supported for LlamaForCausalLM"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "a separate rope for some layers"),
        ({"rope_scaling": {"type": "su"}}, "rope scaling 'su' is not supported"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "linear"}},
            "'linear' is not supported",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: expected a number, found 'small'"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"]}, "layer_types"),
        ({"architectures": ["Phi3ForCausalLM"], "attention_bias": True}, "attention_bias true"),
        (
            {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope", "short_factor": [1]}},
            "short_factor: expected 64 positive numbers",
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "bidirectional"),
        ({"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"architectures": ["GraniteForCausalLM"], "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"architectures": ["GraniteForCausalLM"], "sliding_window": 4096}, "sliding_window 4096"),
        ({"architectures": ["GraniteForCausalLM"], "logits_scaling": 0}, "logits_scaling: expected a positive"),
        ({"architectures": ["SmolLM3ForCausalLM"], "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"architectures": ["SmolLM3ForCausalLM"], "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]},
            "no_rope_layers: expected 0 or 1 for each of 32 layers",
        ),
        ({"architectures": ["Olmo2ForCausalLM"], "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"architectures": ["Olmo2ForCausalLM"], "sliding_window": 4096}, "sliding_window 4096"),
        ({"architectures": ["Ministral3ForCausalLM"], "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"architectures": ["Ministral3ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types"),
        (
            {"architectures": ["Ministral3ForCausalLM"], "rope_scaling": {"type": "default"}},
            "llama_4_scaling_beta: expected a number, found None",
        ),
        (
            {
                "architectures": ["Mistral3ForConditionalGeneration"],
                "text_config": {"model_type": "llama", "hidden_size": 64},
            },
            'model_type "llama" is not supported for Mistral3ForConditionalGeneration; supported: "mistral"',
        ),
        ({"architectures": ["Olmo3ForCausalLM"], "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        (
            {"architectures": ["Gemma4UnifiedForConditionalGeneration"]},
            "Gemma4UnifiedForCond.* is not supported",
        ),
        ({**GEMMA_4, "use_bidirectional_attention": "all"}, 'use_bidirectional_attention "all"'),
        ({**GEMMA_4, "enable_moe_block": True}, "num_experts: expected a positive integer, found None"),
        (
            {**GEMMA_4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 8},
            "top_k_experts: expected at most num_experts 4, found 8",
        ),
        ({**GEMMA_4, "hidden_activation": "silu"}, 'hidden_activation "silu"'),
        ({**GEMMA_4, "rope_scaling": {"rope_type": "linear"}}, "rope_scaling .* not supported for Gemma4"),
        ({**GEMMA_4, "rope_parameters": {"full_attention": {}}}, "rope_theta: expected a number, found None"),
        ({**GEMMA_4, "num_kv_shared_layers": 30}, "with keys of its own, found sliding_attention"),
        ({**GEMMA_4, "num_kv_shared_layers": 33}, "num_kv_shared_layers 33: .* found none"),
        ({**GEMMA_4, "num_kv_shared_layers": -1}, "num_kv_shared_layers -1"),
        ({**GEMMA_4, "per_layer_config": {"00": {"head_dim": 64}}}, "per_layer_config: .* found different"),
        ({**GEMMA_4, "per_layer_config": {"31": {"skip": ["mlp"]}}}, "per_layer_config: .* found skip"),
        (
            {**GEMMA_4, "attention_k_eq_v": True, "num_global_key_value_heads": 3},
            "full_attention: expected a divisor of num_attention_heads 32, found 3",
        ),
        ({**GEMMA_4, "vocab_size_per_layer_input": 9}, "expected at least vocab_size 128256, found 9"),
        ({"architectures": ["GptOssForCausalLM"], "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        (
            {"architectures": ["GptOssForCausalLM"], "num_local_experts": 2},
            "num_experts_per_tok: expected at most num_local_experts 2, found 4",
        ),
        ({"architectures": ["Olmo3ForCausalLM"], "rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({**QWEN_35, "hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({**QWEN_35, "attn_output_gate": False}, "attn_output_gate false"),
        (
            {**QWEN_35, "layer_types": ["linear_attention"] * 32},
            "one at least that attends; found 32 of linear",
        ),
        ({**QWEN_35, "layer_types": ["full_attention"] * 31}, "layer_types: expected 32 .* found 31"),
        ({**QWEN_35, "layer_types": ["full_attention"] * 31 + ["mamba"]}, "found 32 of full_attention, mamba"),
        ({**QWEN_35, "linear_num_value_heads": 24}, "a multiple of linear_num_key_heads 16, found 24"),
        ({**QWEN_35, "linear_conv_kernel_dim": 9}, "linear_conv_kernel_dim: expected 2 to 8, found 9"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    """The refusal has the value that was found, and the supported ones."""
    unnamed = {"model_type": None} if "architectures" in change else {}
    _write_config(tmp_path, **HUB_CONFIGS["Llama-3.1"] | {"rope_scaling": None} | unnamed | change)
    with pytest.raises(CheckpointInvalid, match=expected):
        read_config(tmp_path)


def _write_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


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
