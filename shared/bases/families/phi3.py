"""Phi-3 and Phi-4, dense: Llama with fused projections in the checkpoint, LongRoPE and partial rotation."""

from __future__ import annotations

from dataclasses import replace

from shared.bases.config import ModelConfig, TensorNames
from shared.bases.family import Family, llama_like, windowed
from shared.bases.hf_config import HfConfig

NAMES = TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("layer_types", None)
    model = llama_like(config, max_positions=4096, partial_rotary=True)
    window = config.integer_or_none("sliding_window", None)
    return replace(
        model,
        layers=windowed(model.layers, config, window, lambda _: True),
        names=NAMES,
        norm_eps=config.number("rms_norm_eps", 1e-5),
    )


FAMILY = Family(("Phi3ForCausalLM",), _read)
