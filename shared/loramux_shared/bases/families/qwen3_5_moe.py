"""Qwen 3.5, mixtures of experts: as Qwen 3.5, with experts in all layers, and one that all rows have."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.qwen3_5 import DELTA, SIZES, qwen35_like
from loramux_shared.bases.families.qwen3_moe import read_experts
from loramux_shared.bases.family import EXPERTS, Architecture, Family
from loramux_shared.bases.hf_config import HfConfig

OF_CLASS = SIZES | {
    "num_hidden_layers": 40,
    "hidden_size": 2048,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}


def _read(config: HfConfig) -> ModelConfig:
    model = qwen35_like(config, OF_CLASS)
    experts = read_experts(config, renormalised=True, num=256, intermediate=512)
    experts = replace(experts, shared=config.size("shared_expert_intermediate_size", 512))
    return replace(model, layers=tuple(replace(layer, mlp=experts) for layer in model.layers))


FAMILY = Family(
    (
        Architecture("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
        Architecture("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", nested=True),
    ),
    _read,
    models="Qwen 3.5, mixtures of experts",
    describes=DELTA | EXPERTS,
)
