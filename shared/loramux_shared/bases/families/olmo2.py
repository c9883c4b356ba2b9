"""OLMo 2: norms behind attention and MLP instead of before them, and of all heads of a row together."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, ReadRope, llama_like, refuse_windows
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope_config import read_rope

NAMES = TensorNames(
    input_norm=None,
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
)


def olmo_like(config: HfConfig, rope: ReadRope = read_rope) -> ModelConfig:
    """Return what OLMo 2 and 3 have in common."""
    config.require("hidden_act", "silu")
    model = llama_like(config, rope=rope)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        names=NAMES,
        qk_norm_of_heads=False,
        qkv_bias=bias,
        o_bias=bias,
    )


def _read(config: HfConfig) -> ModelConfig:
    model = olmo_like(config)
    refuse_windows(config, model)
    return model


FAMILY = Family(
    (Architecture("Olmo2ForCausalLM", "olmo2"),),
    _read,
    models="OLMo 2",
)
