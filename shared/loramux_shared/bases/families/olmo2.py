"""OLMo 2: norms behind attention and MLP instead of before them. OLMo 3: most of its layers slide too.

OLMoE: norms before them, and mixtures of experts.
"""

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import NAMES as NAMES_OF_QWEN, read_experts
from loramux_shared.bases.family import (
    EXPERTS,
    Architecture,
    Family,
    ReadRope,
    layer_types,
    llama_like,
    refuse_windows,
    windowed,
)
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec, read_rope, read_rope_of

NAMES = TensorNames(
    input_norm=None,
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
)


def olmo_like(config: HfConfig, rope: ReadRope = read_rope, max_positions: int = 2048) -> ModelConfig:
    """Return what OLMo 2, 3 and OLMoE have in common."""
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=max_positions, rope=rope)
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


FAMILY = Family((Architecture("Olmo2ForCausalLM", "olmo2"),), _read, models="OLMo 2")


THETA = 500_000.0
"""Theta of sliding layers, whatever the config has beside the blocks: that value is for the full layers."""


def _read_3(config: HfConfig) -> ModelConfig:
    model = olmo_like(config, rope=_full_rope)
    types = layer_types(config, len(model.layers), _slides)
    sliding = read_rope_of(config, "sliding_attention", model.dims.head_dim, model.max_positions, THETA)
    layers = tuple(
        layer.changing(rope=sliding) if kind == "sliding_attention" else layer
        for layer, kind in zip(model.layers, types, strict=True)
    )
    window = config.integer_or_none("sliding_window", 4096)
    return replace(model, layers=windowed(layers, config, window, _slides))


def _slides(index: int) -> bool:
    return (index + 1) % 4 != 0


def _full_rope(config: HfConfig, dim: int, longest: int) -> tuple[RopeSpec, int]:
    theta = config.number("rope_theta", THETA)
    return read_rope_of(config, "full_attention", dim, longest, theta), longest


FAMILY_3 = Family((Architecture("Olmo3ForCausalLM", "olmo3"),), _read_3, models="OLMo 3")


def _read_moe(config: HfConfig) -> ModelConfig:
    config.require("clip_qkv", None)
    model = olmo_like(config, max_positions=4096)
    refuse_windows(config, model)
    experts = read_experts(config, renormalised=config.flag("norm_topk_prob", default=False), num=64)
    experts = replace(experts, intermediate=model.dims.intermediate)
    layers = tuple(replace(layer, mlp=experts) for layer in model.layers)
    return replace(model, layers=layers, names=NAMES_OF_QWEN)


FAMILY_MOE = Family((Architecture("OlmoeForCausalLM", "olmoe"),), _read_moe, models="OLMoE", describes=EXPERTS)
