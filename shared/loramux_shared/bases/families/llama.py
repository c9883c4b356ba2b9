"""Llama 2 and 3, and what is made like them (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.family import Architecture, Family, layer_types, llama_like
from loramux_shared.bases.hf_config import HfConfig


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    bias = config.flag("attention_bias", default=False)
    mlp_bias = config.flag("mlp_bias", default=False)
    model = llama_like(config)
    # transformers has no window for it, and drops what is behind one from its cache all the same.
    window = config.integer_or_none("sliding_window", None)
    if window is not None and window < model.max_positions:
        config.require("sliding_window", None)
    if "sliding_attention" in layer_types(config, len(model.layers), lambda _: False):
        config.require("layer_types", None)
    return replace(model, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family((Architecture("LlamaForCausalLM", "llama"),), _read)
