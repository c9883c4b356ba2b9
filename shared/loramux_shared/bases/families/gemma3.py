"""Gemma 3, text: as Gemma 2, with a norm of every head instead of caps, and another rope where layers slide.

Of a checkpoint with images (``Gemma3ForConditionalGeneration``) the text decoder is served.
"""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.gemma2 import NAMES, SIZES, gemma_like
from loramux_shared.bases.family import Architecture, Family, layer_types, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec
from loramux_shared.bases.rope_config import read_rope_of

THETAS = {
    "full_attention": ("rope_theta", 1_000_000.0),
    "sliding_attention": ("rope_local_base_freq", 10_000.0),
}
"""For each type of layer, its key beside the blocks, and the default."""


def _read(config: HfConfig) -> ModelConfig:
    config.require("attn_logit_softcapping", None)
    pattern = config.size("sliding_window_pattern", 6)

    def slides(index: int) -> bool:
        return (index + 1) % pattern != 0

    model = gemma_like(config, max_positions=131072, sizes=SIZES | {"vocab_size": 262208}, rope=_full_rope)
    types = layer_types(config, len(model.layers), slides)
    sliding = _rope(config, "sliding_attention", model.dims.head_dim, model.max_positions)
    layers = tuple(
        layer.turning(sliding) if kind == "sliding_attention" else layer
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


FAMILY = Family(
    (
        Architecture("Gemma3ForCausalLM", "gemma3_text"),
        Architecture("Gemma3ForConditionalGeneration", "gemma3", nested=True),
    ),
    _read,
    models="Gemma 3",
)
