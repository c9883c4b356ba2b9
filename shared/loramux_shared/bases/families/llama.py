"""Llama 2 and 3, and what is made like them (SmolLM2, TinyLlama, Yi, ...)."""

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.family import Architecture, Family, llama_like, refuse_windows
from loramux_shared.bases.hf_config import HfConfig


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    bias = config.flag("attention_bias", default=False)
    mlp_bias = config.flag("mlp_bias", default=False)
    model = llama_like(config)
    refuse_windows(config, model)
    return replace(model, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family(
    (Architecture("LlamaForCausalLM", "llama"),), _read, models="Llama 2 and 3, SmolLM2, TinyLlama, Yi"
)
