"""How a checkpoint's ``config.json`` is read: as transformers takes it, or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from loramux_shared.bases.families import load_families
from loramux_shared.bases.read import read_config
from loramux_shared.faults import CheckpointInvalid

# As the hub has them: written by transformers 4, and by people.
HUB_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "eos_token_id": [128001, 128008, 128009],
    },
    "Mistral-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Qwen2.5-yarn": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "sliding_window": 131072,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "gemma-2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "eos_token_id": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 256,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "eos_token_id": [1, 106],
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "eos_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1 + index for index in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 200064,
    },
    "granite-3.3-2b": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49159,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "eos_token_id": 128012,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "rope_scaling": None,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "SmolLM3-windows": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "eos_token_id": 128012,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 0, 0, 1, 0],
        "sliding_window": 4096,
        "use_sliding_window": True,
        "vocab_size": 128256,
    },
    "Olmo-3-7B": {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "eos_token_id": 100257,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 100278,
    },
    "Ministral-3-8B": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "image_token_index": 10,
        "text_config": {
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 262144,
            "eos_token_id": 2,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": 34,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "pixtral"},
    },
    "Mistral-Small-3.1": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "max_position_embeddings": 131072,
            "eos_token_id": 2,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000000.0,
            "sliding_window": None,
            "vocab_size": 131072,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "pixtral"},
    },
    "Ministral-3-of-its-class": {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 34,
        "eos_token_id": 2,
        "vocab_size": 131072,
    },
    "OLMo-2-7B": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "eos_token_id": 100257,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_theta": 500000,
        "torch_dtype": "float32",
        "vocab_size": 100352,
    },
}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_older_configs_mean_what_transformers_takes_them_for(tmp_path: Path, name: str) -> None:
    """A config without what is default, and the same as transformers writes it out, are the same model."""
    _write_config(tmp_path, **HUB_CONFIGS[name])
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    for max_seq_len in (None, 8192):
        assert read_config(tmp_path, max_seq_len) == read_config(tmp_path / "full", max_seq_len)


@pytest.mark.parametrize(
    ("change", "told"),
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
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "a rope of its own for some layers"),
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
        ({"architectures": ["Olmo3ForCausalLM"], "rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    """With the value that was found, and what would be served."""
    unnamed = {"model_type": None} if "architectures" in change else {}
    _write_config(tmp_path, **HUB_CONFIGS["Llama-3.1"] | {"rope_scaling": None} | unnamed | change)
    with pytest.raises(CheckpointInvalid, match=told):
        read_config(tmp_path)


def test_the_page_about_models_names_every_architecture() -> None:
    """What is served and what is documented are the same list."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == set(load_families())


def _write_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(fields))
