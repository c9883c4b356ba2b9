"""Llama 2 and 3, and what is made like them (SmolLM2, TinyLlama, Yi, ...)."""

from __future__ import annotations

from dataclasses import replace

from shared.bases.config import ModelConfig
from shared.bases.family import Family, llama_like
from shared.bases.hf_config import HfConfig


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    bias = config.flag("attention_bias", default=False)
    mlp_bias = config.flag("mlp_bias", default=False)
    return replace(llama_like(config), qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family(("LlamaForCausalLM",), _read)
