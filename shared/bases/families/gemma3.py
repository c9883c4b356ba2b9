"""Gemma 3, text: as Gemma 2, with a norm of every head instead of caps, and another rope where layers slide.

Of a checkpoint with images (``Gemma3ForConditionalGeneration``) the text decoder is served.
"""

from __future__ import annotations

from dataclasses import replace

from shared.bases.config import ModelConfig
from shared.bases.families.gemma2 import NAMES, gemma_like
from shared.bases.family import Family, layer_types, windowed
from shared.bases.hf_config import HfConfig
from shared.bases.rope import RopeSpec
from shared.bases.rope_config import read_scaling

GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


def _read(config: HfConfig) -> ModelConfig:
    config.require("attn_logit_softcapping", None)
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))

    def slides(index: int) -> bool:
        return (index + 1) % pattern != 0

    model = gemma_like(config, max_positions=131072)
    types = layer_types(config, len(model.layers), slides)
    ropes = _ropes(config, model.dims.head_dim, model.max_positions)
    layers = tuple(replace(layer, rope=ropes[kind]) for layer, kind in zip(model.layers, types, strict=True))
    window = config.integer_or_none("sliding_window", 4096)
    names = replace(
        NAMES,
        prefixes=("model.", "language_model.model.", "model.language_model."),
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


def _ropes(config: HfConfig, dim: int, longest: int) -> dict[str, RopeSpec]:
    """Per layer type. Before transformers 5, ``rope_scaling`` is about the full layers alone."""
    if config.fields.get("rope_parameters"):
        block = config.block("rope_parameters")
        full, local = block.block("full_attention"), block.block("sliding_attention")
    else:
        full, local = config.block("rope_scaling"), config.block("no_scaling")
    return {
        kind: RopeSpec(
            dim,
            block.number("rope_theta", theta),
            read_scaling(block, dim, longest, block.integer("original_max_position_embeddings", longest))[0],
        )
        for kind, block, theta in (
            ("full_attention", full, config.number("rope_theta", GLOBAL_THETA)),
            ("sliding_attention", local, config.number("rope_local_base_freq", LOCAL_THETA)),
        )
    }


FAMILY = Family(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _read)
