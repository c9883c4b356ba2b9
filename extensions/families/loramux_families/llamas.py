"""Decoders that are Llama with few switches: Seed-OSS, ERNIE 4.5, EXAONE 4, Helium and StableLM."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.olmo2 import NAMES as EXAONE_NAMES
from loramux_shared.bases.family import Architecture, Family, layer_types, llama_like, refuse_windows, windowed
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


def _read_ernie(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=131072, tied=True, sizes=ERNIE_SIZES, rope=ERNIE_ROPE)
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


ERNIE = Family((Architecture("Ernie4_5ForCausalLM", "ernie4_5"),), _read_ernie, models="ERNIE 4.5, dense")

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
