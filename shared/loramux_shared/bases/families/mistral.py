"""Mistral, Mixtral, Ministral 3, and Mistral 3: models with images, of which the text decoder is served."""

from dataclasses import replace
from functools import partial
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import read_experts
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import QueryScaling, original_positions, read_rope, rope_block, with_rope


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=131072, sizes={"num_key_value_heads": 8})
    window = config.integer_or_none("sliding_window", 4096)
    return replace(model, layers=windowed(model.layers, config, window, lambda _: True))


MISTRAL = Family(
    (Architecture("MistralForCausalLM", "mistral"), Architecture("MinistralForCausalLM", "ministral")),
    _read,
    models="Mistral 7B, Nemo, Ministral 8B of 2024",
)


MIXTRAL_NAMES: Final = TensorNames(
    router="block_sparse_moe.gate", experts="block_sparse_moe.experts", expert=("w1", "w3", "w2")
)


def _read_mixtral(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("layer_types", None)
    rope = partial(read_rope, default_theta=1_000_000.0)
    sizes = {"num_key_value_heads": 8, "intermediate_size": 14336}
    model = llama_like(config, max_positions=131072, sizes=sizes, rope=rope)
    experts = read_experts(config, renormalised=True, num=8, top_k=2)
    experts = replace(experts, intermediate=model.dims.intermediate)
    window = config.integer_or_none("sliding_window", None)
    layers = tuple(replace(layer, mlp=experts) for layer in model.layers)
    return replace(
        model,
        layers=windowed(layers, config, window, lambda _: True),
        names=MIXTRAL_NAMES,
        norm_eps=config.number("rms_norm_eps", 1e-5),
    )


MIXTRAL = Family(
    (Architecture("MixtralForCausalLM", "mixtral"),),
    _read_mixtral,
    models="Mixtral 8x7B, 8x22B",
    describes=EXPERTS,
)


MAX_POSITIONS: Final = 262144
MINISTRAL_SIZES: Final = {"num_key_value_heads": 8, "head_dim": 128}
MINISTRAL_ROPE: Final[dict[str, Any]] = {
    "type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Default of a config without a rope block."""


def _read_ministral(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("layer_types", None)
    config = with_rope(config, MINISTRAL_ROPE)
    model = llama_like(config, max_positions=MAX_POSITIONS, sizes=MINISTRAL_SIZES)
    block = rope_block(config)
    length = original_positions(config, block, config.size("max_position_embeddings", MAX_POSITIONS))
    window = config.integer_or_none("sliding_window", None)
    return replace(
        model,
        layers=windowed(model.layers, config, window, lambda _: True),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        query_scaling=QueryScaling(block.number("llama_4_scaling_beta"), length),
    )


MINISTRAL = Family(
    (Architecture("Ministral3ForCausalLM", "ministral3"),), _read_ministral, models="Ministral 3, text alone"
)


DECODERS = {"mistral": MISTRAL, "ministral3": MINISTRAL}
"""Decoder families by ``model_type`` of ``text_config``; the first is the default."""


def _read_nested(config: HfConfig) -> ModelConfig:
    config.require("model_type", *DECODERS)
    config.require("layer_types", None)
    model = DECODERS[config.text("model_type", "mistral")].read(config)
    prefixes = "language_model.model.", "model.language_model."
    return replace(
        model, names=replace(model.names, prefixes=prefixes, heads=("lm_head", "language_model.lm_head"))
    )


NESTED = Family(
    (Architecture("Mistral3ForConditionalGeneration", "mistral3", nested=True),),
    _read_nested,
    models="Mistral Small 3.1 and 3.2, Ministral 3",
)
