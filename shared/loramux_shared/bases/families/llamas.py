"""Decoders that are Llama or another one with few switches, as Seed-OSS, ERNIE 4.5, Helium and GLM-4.1V."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.glm import FAMILY_4 as GLM_4
from loramux_shared.bases.families.olmo2 import NAMES as EXAONE_NAMES
from loramux_shared.bases.families.qwen2 import read_experts
from loramux_shared.bases.families.qwen_vl import PREFIXES
from loramux_shared.bases.family import (
    EXPERTS,
    Architecture,
    Family,
    layer_types,
    llama_like,
    refuse_windows,
    windowed,
)
from loramux_shared.bases.family_layers import RoutedLayer
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import Still, read_rope
from loramux_shared.faults import CheckpointInvalid

SEED_SIZES: Final = {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_attention_heads": 80,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "vocab_size": 155136,
}


def _read_seed(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=524288, sizes=SEED_SIZES)
    refuse_windows(config, model)
    return replace(
        model,
        qkv_bias=config.flag("attention_bias", default=True),
        o_bias=config.flag("attention_out_bias", default=False),
        mlp_bias=config.flag("mlp_bias", default=False),
    )


SEED = Family((Architecture("SeedOssForCausalLM", "seed_oss"),), _read_seed, models="Seed-OSS")

ERNIE_SIZES: Final = {
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 18,
    "num_key_value_heads": 2,
    "vocab_size": 103424,
}
ERNIE_ROPE: Final = partial(read_rope, default_theta=500_000.0)


def _ernie_like(config: HfConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """Return a decoder with dense MLPs; sizes are those of its class."""
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=131072, tied=True, sizes=sizes, rope=ERNIE_ROPE)
    refuse_windows(config, model)
    rope = replace(model.ropes[0], neighbours=True)
    bias = config.flag("use_bias", default=False)
    return replace(
        model,
        layers=tuple(layer.changing(rope=rope) for layer in model.layers),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _read_ernie(config: HfConfig) -> ModelConfig:
    return _ernie_like(config, ERNIE_SIZES)


ERNIE = Family((Architecture("Ernie4_5ForCausalLM", "ernie4_5"),), _read_ernie, models="ERNIE 4.5, dense")

ERNIE_MOE_SIZES: Final = {
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 103424,
}


def _read_ernie_moe(config: HfConfig) -> ModelConfig:
    config.require("use_bias", False)
    config.require("moe_use_aux_free", True)
    model = _ernie_like(config, ERNIE_MOE_SIZES)
    own = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
    known = {key: config.fields.get(name) for key, name in own.items()}
    named = HfConfig({**config.fields, **known}, config.architecture)
    sizes = read_experts(named, renormalised=True, num=64, top_k=6, intermediate=1536)
    spec = RoutedLayer(
        sizes.num,
        sizes.top_k,
        sizes.intermediate,
        shared=sizes.intermediate * config.integer("moe_num_shared_experts", 2) or None,
        scores="softmax",
        corrected=True,
        correction="mlp.moe_statics.e_score_correction_bias",
    )
    every = config.size("moe_layer_interval", 1)
    first, last = config.integer("moe_layer_start_index", 1), config.integer("moe_layer_end_index", -1)
    last = len(model.layers) - 1 if last == -1 else last
    layers = tuple(
        replace(layer, mlp=spec) if first <= index <= last and (index + 1) % every == 0 else layer
        for index, layer in enumerate(model.layers)
    )
    return replace(model, layers=layers, names=TensorNames(shared_expert="mlp.shared_experts"))


ERNIE_MOE = Family(
    (Architecture("Ernie4_5_MoeForCausalLM", "ernie4_5_moe"),),
    _read_ernie_moe,
    models="ERNIE 4.5, mixtures of experts",
    describes=EXPERTS | {"moe_num_experts"},
)

EXAONE_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 102400,
}


def _read_exaone(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, sizes=EXAONE_SIZES)
    window, layers = config.integer_or_none("sliding_window", 4096), model.layers
    if window is None:
        refuse_windows(config, model)
    else:
        explicit = config.array("layer_types") is not None
        every = 1 if explicit else config.size("sliding_window_pattern", 4)
        kinds = layer_types(config, len(layers), lambda index: (index + 1) % every != 0)
        still = replace(model.ropes[0], scaling=Still())
        turned = zip(layers, kinds, strict=True)
        layers = tuple(
            layer if kind == "sliding_attention" else layer.changing(rope=still) for layer, kind in turned
        )
        layers = windowed(layers, config, window, lambda index: (index + 1) % every != 0)
    return replace(model, layers=layers, names=EXAONE_NAMES, norm_eps=config.number("rms_norm_eps", 1e-5))


EXAONE = Family((Architecture("Exaone4ForCausalLM", "exaone4"),), _read_exaone, models="EXAONE 4")

HELIUM_SIZES: Final = {
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 7040,
    "num_attention_heads": 20,
    "num_hidden_layers": 24,
    "num_key_value_heads": 20,
    "vocab_size": 48000,
}
HELIUM_ROPE: Final = partial(read_rope, default_theta=100_000.0)


def _read_helium(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=4096, sizes=HELIUM_SIZES, rope=HELIUM_ROPE)
    refuse_windows(config, model)
    dims, rope = model.dims, replace(model.ropes[0], neighbours=True)
    if dims.num_heads * dims.head_dim != dims.hidden:
        raise CheckpointInvalid(
            f"config.json: head_dim: expected num_attention_heads {dims.num_heads} of them to be hidden_size "
            f"{dims.hidden}, found {dims.head_dim}."
        )
    return replace(
        model,
        layers=tuple(layer.changing(rope=rope) for layer in model.layers),
        norm_eps=config.number("rms_norm_eps", 1e-8),
        qkv_bias=config.flag("attention_bias", default=False),
        mlp_bias=config.flag("mlp_bias", default=False),
    )


HELIUM = Family((Architecture("HeliumForCausalLM", "helium"),), _read_helium, models="Helium 1")

STABLE_SIZES: Final = {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 50304,
}
STABLE_ROPE: Final = partial(read_rope, default_part=0.25)


def _read_stable(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("qk_layernorm", False)
    config.require("head_dim", None)  # transformers takes no other than the usual one
    model = llama_like(config, max_positions=4096, sizes=STABLE_SIZES, rope=STABLE_ROPE)
    refuse_windows(config, model)
    parallel = config.flag("use_parallel_residual", default=False)
    return replace(
        model,
        names=TensorNames(mlp_norm=None) if parallel else TensorNames(),
        norm_eps=config.number("layer_norm_eps", 1e-5),
        layer_norm=True,
        norm_bias=True,
        parallel=parallel,
        qkv_bias=config.flag("use_qkv_bias", default=False),
    )


STABLE = Family(
    (Architecture("StableLmForCausalLM", "stablelm"),),
    _read_stable,
    models="StableLM 3B, StableLM 2 1.6B and Zephyr",
)

GLM_V: Final = {
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
}
"""Fields of the class of GLM-4.1V whose values are others than those of GLM-4."""


def _read_glm_v(config: HfConfig) -> ModelConfig:
    config.require("attention_bias", True)
    own = {key: value for key, value in config.fields.items() if value is not None}
    fields = {"head_dim": None, "num_key_value_heads": config.fields.get("num_key_value_heads", 2)}
    model = GLM_4.read(HfConfig({**GLM_V, **fields, **own}, config.architecture, config.max_seq_len))
    return replace(model, names=replace(model.names, prefixes=PREFIXES))


GLM_4_V = Family(
    (Architecture("Glm4vForConditionalGeneration", "glm4v", nested=True, flat=True),),
    _read_glm_v,
    models="GLM-4.1V",
)
