"""Gemma 2: norms before and after each block, GeGLU, soft caps, every other layer slides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, ReadRope, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope_config import read_rope

SIZES = {
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
}
"""Defaults of the config; models with images leave out much."""
NAMES = TensorNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def gemma_like(
    config: HfConfig,
    *,
    max_positions: int,
    sizes: Mapping[str, int],
    rope: ReadRope = read_rope,
) -> ModelConfig:
    """Return what Gemma 2 and 3 have in common."""
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.require("use_bidirectional_attention", False)
    model = llama_like(config, max_positions=max_positions, tied=True, sizes=sizes, rope=rope)
    bias = config.flag("attention_bias", default=False)
    scale = config.positive("query_pre_attn_scalar", 256.0) ** -0.5
    return replace(
        model,
        layers=tuple(layer.attending(scale=scale) for layer in model.layers),
        names=NAMES,
        norm_offset=1.0,
        qkv_bias=bias,
        o_bias=bias,
        activation="gelu_tanh",
        embedding_scale=model.dims.hidden**0.5,
    )


def _read(config: HfConfig) -> ModelConfig:
    model = gemma_like(config, max_positions=8192, sizes=SIZES | {"vocab_size": 256000})
    softcap = config.number_or_none("attn_logit_softcapping", 50.0)
    window = config.integer_or_none("sliding_window", 4096)
    capped = tuple(layer.attending(softcap=softcap) for layer in model.layers)
    return replace(
        model,
        layers=windowed(capped, config, window, lambda index: index % 2 == 0),
        logit_softcap=config.number_or_none("final_logit_softcapping", 30.0),
    )


FAMILY = Family(
    (Architecture("Gemma2ForCausalLM", "gemma2"),),
    _read,
    models="Gemma 2",
)
