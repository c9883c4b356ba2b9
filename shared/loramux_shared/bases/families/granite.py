"""Granite 3, dense: Llama with factors of embeddings, attention, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.family import Architecture, Family, llama_like, refuse_windows
from loramux_shared.bases.hf_config import HfConfig


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config)
    refuse_windows(config, model)
    bias = config.flag("attention_bias", default=False)
    scale = config.positive("attention_multiplier", 1.0)
    return replace(
        model,
        layers=tuple(layer.attending(scale=scale) for layer in model.layers),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logit_divisor=config.positive("logits_scaling", 1.0),
    )


FAMILY = Family(
    (Architecture("GraniteForCausalLM", "granite"),),
    _read,
    models="Granite 3, dense",
)
