"""Ministral 3: Mistral with YaRN, and queries that grow with their position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from loramux_shared.bases.attention import QueryScaling
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.family import Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope_config import original_positions, rope_block, with_rope

MAX_POSITIONS: Final = 262144
SIZES: Final = {"num_key_value_heads": 8, "head_dim": 128}
ROPE: Final[dict[str, Any]] = {
    "type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Default of a config without a rope block."""


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("layer_types", None)
    config = with_rope(config, ROPE)
    model = llama_like(config, max_positions=MAX_POSITIONS, sizes=SIZES)
    block = rope_block(config)
    length = original_positions(config, block, config.size("max_position_embeddings", MAX_POSITIONS))
    window = config.integer_or_none("sliding_window", None)
    return replace(
        model,
        layers=windowed(model.layers, config, window, lambda _: True),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        query_scaling=QueryScaling(block.number("llama_4_scaling_beta"), length),
    )


FAMILY = Family(
    (Architecture("Ministral3ForCausalLM", "ministral3"),),
    _read,
    models="Ministral 3, text alone",
)
