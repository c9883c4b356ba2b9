"""Cohere, as Command R and Aya: attention and MLP side by side behind one norm, and a scale of the logits.

Cohere 2: most layers slide, and the others know no positions.
"""

from dataclasses import replace
from functools import partial

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import (
    Architecture,
    Family,
    ReadRope,
    layer_types,
    llama_like,
    refuse_windows,
    windowed,
)
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import Still, read_rope

SIZES = {
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_attention_heads": 64,
    "num_hidden_layers": 40,
    "vocab_size": 256000,
}
ROPE = partial(read_rope, default_theta=500_000.0)


def _cohere_like(config: HfConfig, rope: ReadRope) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=8192, tied=True, sizes=SIZES, rope=rope)
    turned = replace(model.ropes[0], neighbours=True)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        layers=tuple(layer.changing(rope=turned) for layer in model.layers),
        names=TensorNames(mlp_norm=None),
        norm_eps=config.number("layer_norm_eps", 1e-5),
        layer_norm=True,
        parallel=True,
        qkv_bias=bias,
        o_bias=bias,
        logit_divisor=1 / config.positive("logit_scale", 0.0625),
    )


def _read(config: HfConfig) -> ModelConfig:
    config.require("use_qk_norm", False)
    model = _cohere_like(config, ROPE)
    refuse_windows(config, model)
    return model


FAMILY = Family((Architecture("CohereForCausalLM", "cohere"),), _read, models="Command R, Aya 23 and Expanse")


def _read_2(config: HfConfig) -> ModelConfig:
    model, pattern = _cohere_like(config, read_rope), config.size("sliding_window_pattern", 4)
    config.require("head_dim", model.dims.hidden // model.dims.num_heads)  # transformers takes no other

    def slides(index: int) -> bool:
        return (index + 1) % pattern != 0

    window = config.integer_or_none("sliding_window", 4096)
    still = replace(model.ropes[0], scaling=Still())
    types = layer_types(config, len(model.layers), slides)
    layers = tuple(
        layer if kind == "sliding_attention" and window is not None else layer.changing(rope=still)
        for layer, kind in zip(model.layers, types, strict=True)
    )
    return replace(model, layers=windowed(layers, config, window, slides))


FAMILY_2 = Family(
    (Architecture("Cohere2ForCausalLM", "cohere2"),), _read_2, models="Command R7B and A, Tiny Aya"
)
