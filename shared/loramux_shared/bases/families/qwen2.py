"""Qwen 2 and 2.5: a bias on queries, keys and values. Qwen 3: a norm of every query and key head."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import LayerSpec


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes={"num_key_value_heads": 32})
    return replace(model, layers=qwen_windows(model, config), qkv_bias=True)


def qwen_windows(model: ModelConfig, config: HfConfig) -> tuple[LayerSpec, ...]:
    """Return the layers with their windows, which Qwen 3 has too."""
    if not config.flag("use_sliding_window", default=False):
        return model.layers
    first = config.integer("max_window_layers", 28)
    window = config.integer_or_none("sliding_window", 4096)
    return windowed(model.layers, config, window, lambda index: index >= first)


FAMILY = Family(
    (Architecture("Qwen2ForCausalLM", "qwen2"),),
    _read,
    models="Qwen 2 and 2.5, dense",
)


NAMES = TensorNames(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def _read_3(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes={"num_key_value_heads": 32, "head_dim": 128})
    bias = config.flag("attention_bias", default=False)
    layers = qwen_windows(model, config)
    return replace(model, layers=layers, names=NAMES, qkv_bias=bias, o_bias=bias)


FAMILY_3 = Family(
    (Architecture("Qwen3ForCausalLM", "qwen3"),),
    _read_3,
    models="Qwen 3, dense",
)
