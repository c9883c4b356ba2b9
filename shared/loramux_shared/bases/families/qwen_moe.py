"""Mixtures of experts of Qwen 1.5 and 2, and of Qwen 3 VL, of which the text decoder is served."""

from dataclasses import replace
from typing import Final

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.qwen2 import read_experts, with_experts
from loramux_shared.bases.families.qwen_vl import qwen3_vl_like
from loramux_shared.bases.family import EXPERTS, Architecture, Family, layer_types, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig

SIZES: Final = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
}


def _read_2(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes=SIZES)
    layers, first = model.layers, config.integer("max_window_layers", 28)
    if config.flag("use_sliding_window", default=False):
        window = config.integer_or_none("sliding_window", 4096)
        layers = windowed(layers, config, window, lambda index: index % 2 == 0 and index < first)
    elif "sliding_attention" in layer_types(config, len(layers), lambda _: False):
        config.require("layer_types", None)
    renormalised = config.flag("norm_topk_prob", default=False)
    experts = read_experts(config, renormalised=renormalised, num=60, top_k=4, intermediate=1408)
    experts = replace(experts, shared=config.size("shared_expert_intermediate_size", 5632))
    return replace(
        model,
        layers=with_experts(config, layers, experts),
        qkv_bias=config.flag("qkv_bias", default=True),
    )


FAMILY_2: Final = Family(
    (Architecture("Qwen2MoeForCausalLM", "qwen2_moe"),),
    _read_2,
    models="Qwen 1.5 and 2, mixtures of experts",
    describes=EXPERTS,
)


def _read_vl(config: HfConfig) -> ModelConfig:
    model = qwen3_vl_like(config, SIZES)
    experts = read_experts(config, renormalised=True, num=60, top_k=4, intermediate=1408)
    experts = replace(experts, either=True)
    return replace(model, layers=with_experts(config, model.layers, experts))


FAMILY_VL: Final = Family(
    (Architecture("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", nested=True, untied=True),),
    _read_vl,
    models="Qwen 3 VL, mixtures of experts",
    describes=EXPERTS,
)
