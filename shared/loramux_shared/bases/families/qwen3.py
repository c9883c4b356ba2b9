"""Qwen 3, dense: a norm of every query and key head, and a head size of its own."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import qwen_windows
from loramux_shared.bases.family import Architecture, Family, llama_like
from loramux_shared.bases.hf_config import HfConfig

NAMES = TensorNames(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes={"num_key_value_heads": 32, "head_dim": 128})
    bias = config.flag("attention_bias", default=False)
    layers = qwen_windows(model, config)
    return replace(model, layers=layers, names=NAMES, qkv_bias=bias, o_bias=bias)


FAMILY = Family(
    (Architecture("Qwen3ForCausalLM", "qwen3"),),
    _read,
    models="Qwen 3, dense",
)
