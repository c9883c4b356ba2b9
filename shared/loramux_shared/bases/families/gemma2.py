"""Gemma 2: norms before and after each block, GeGLU, soft caps, every other layer slides.

Gemma: norms before each block alone, no caps and no windows. Gemma 3, text: as Gemma 2, with a norm of every
head instead of caps, and another rope where layers slide. Of a checkpoint with images
(``Gemma3ForConditionalGeneration``) the text decoder is served.
"""

from collections.abc import Mapping
from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, ReadRope, layer_types, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec, read_rope, read_rope_of

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
    config: HfConfig, *, max_positions: int, sizes: Mapping[str, int], rope: ReadRope = read_rope
) -> ModelConfig:
    """Return what Gemma 2 and 3 have in common."""
    config.require("hidden_activation", "gelu_pytorch_tanh")
    model = _gemma(config, max_positions, sizes, rope)
    scale = config.positive("query_pre_attn_scalar", 256.0) ** -0.5
    return replace(model, layers=tuple(layer.attending(scale=scale) for layer in model.layers), names=NAMES)


def _gemma(config: HfConfig, max_positions: int, sizes: Mapping[str, int], rope: ReadRope) -> ModelConfig:
    config.require("use_bidirectional_attention", False)
    model = llama_like(config, max_positions=max_positions, tied=True, sizes=sizes, rope=rope)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
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


def _read_1(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "gelu_pytorch_tanh", "gelu")  # "gelu" of the first releases meant the same
    config.require("hidden_activation", None, "gelu_pytorch_tanh")
    sizes = {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
    }
    more = {"num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000}
    return _gemma(config, 8192, sizes | more, read_rope)


FAMILY_1 = Family((Architecture("GemmaForCausalLM", "gemma"),), _read_1, models="Gemma, CodeGemma")
FAMILY = Family((Architecture("Gemma2ForCausalLM", "gemma2"),), _read, models="Gemma 2")


THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}
"""For each type of layer, its key beside the blocks, and the default."""


def _read_3(config: HfConfig) -> ModelConfig:
    config.require("attn_logit_softcapping", None)
    pattern = config.size("sliding_window_pattern", 6)

    def slides(index: int) -> bool:
        return (index + 1) % pattern != 0

    model = gemma_like(config, max_positions=131072, sizes=SIZES | {"vocab_size": 262208}, rope=_full_rope)
    types = layer_types(config, len(model.layers), slides)
    sliding = _rope(config, "sliding_attention", model.dims.head_dim, model.max_positions)
    layers = tuple(
        layer.changing(rope=sliding) if kind == "sliding_attention" else layer
        for layer, kind in zip(model.layers, types, strict=True)
    )
    window = config.integer_or_none("sliding_window", 4096)
    names = replace(
        NAMES,
        prefixes=("model.", "language_model.model.", "model.language_model.", ""),
        heads=("lm_head", "language_model.lm_head"),
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
    )
    return replace(
        model,
        layers=windowed(layers, config, window, slides),
        names=names,
        logit_softcap=config.number_or_none("final_logit_softcapping", None),
    )


def _full_rope(config: HfConfig, dim: int, longest: int) -> tuple[RopeSpec, int]:
    return _rope(config, "full_attention", dim, longest), longest


def _rope(config: HfConfig, kind: str, dim: int, longest: int) -> RopeSpec:
    key, theta = THETAS[kind]
    return read_rope_of(config, kind, dim, longest, config.number(key, theta))


FAMILY_3 = Family(
    (
        Architecture("Gemma3ForCausalLM", "gemma3_text"),
        Architecture("Gemma3ForConditionalGeneration", "gemma3", nested=True),
    ),
    _read_3,
    models="Gemma 3",
)
