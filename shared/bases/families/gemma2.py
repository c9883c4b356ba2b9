"""Gemma 2: norms before and after each block, GeGLU, soft caps, every other layer slides."""

from __future__ import annotations

from dataclasses import replace

from shared.bases.config import ModelConfig, TensorNames
from shared.bases.family import Family, llama_like, windowed
from shared.bases.hf_config import HfConfig

NAMES = TensorNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def gemma_like(config: HfConfig, *, max_positions: int) -> ModelConfig:
    """Return what Gemma 2 and 3 have in common."""
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.require("use_bidirectional_attention", False)
    model = llama_like(config, max_positions=max_positions, tied=True)
    bias = config.flag("attention_bias", default=False)
    scale = config.number("query_pre_attn_scalar", 256.0) ** -0.5
    return replace(
        model,
        layers=tuple(replace(layer, attention=replace(layer.attention, scale=scale)) for layer in model.layers),
        names=NAMES,
        norm_offset=1.0,
        qkv_bias=bias,
        o_bias=bias,
        activation="gelu_tanh",
        embedding_scale=model.dims.hidden**0.5,
    )


def _read(config: HfConfig) -> ModelConfig:
    model = gemma_like(config, max_positions=8192)
    softcap = config.number_or_none("attn_logit_softcapping", 50.0)
    window = config.integer_or_none("sliding_window", 4096)
    capped = tuple(
        replace(layer, attention=replace(layer.attention, softcap=softcap)) for layer in model.layers
    )
    return replace(
        model,
        layers=windowed(capped, config, window, lambda index: index % 2 == 0),
        logit_softcap=config.number_or_none("final_logit_softcapping", 30.0),
    )


FAMILY = Family(("Gemma2ForCausalLM",), _read)
