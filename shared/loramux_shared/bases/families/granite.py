"""Granite 3: Llama with factors of embeddings, attention, residuals and logits, and mixtures of experts."""

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import read_experts
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like, refuse_windows
from loramux_shared.bases.hf_config import HfConfig


def granite_like(config: HfConfig) -> ModelConfig:
    """Return what both kinds have in common."""
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
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logit_divisor=config.positive("logits_scaling", 1.0),
    )


def _read(config: HfConfig) -> ModelConfig:
    return replace(granite_like(config), mlp_bias=config.flag("mlp_bias", default=False))


FAMILY = Family((Architecture("GraniteForCausalLM", "granite"),), _read, models="Granite 3, dense")


NAMES = TensorNames(
    router="block_sparse_moe.router.layer",
    experts="block_sparse_moe",
    of_all_experts=("input_linear.weight", "output_linear.weight"),
)


def _read_moe(config: HfConfig) -> ModelConfig:
    model = granite_like(config)
    experts = read_experts(config, renormalised=True, num=8, top_k=2)
    experts = replace(experts, intermediate=model.dims.intermediate)
    return replace(model, layers=tuple(replace(layer, mlp=experts) for layer in model.layers), names=NAMES)


FAMILY_MOE = Family(
    (Architecture("GraniteMoeForCausalLM", "granitemoe"),),
    _read_moe,
    models="Granite 3, mixtures of experts",
    describes=EXPERTS,
)
