"""OLMo 3: OLMo 2 with three layers of four that slide, and a rope of their own for those."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.olmo2 import olmo_like
from loramux_shared.bases.family import Architecture, Family, layer_types, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec
from loramux_shared.bases.rope_config import read_rope_of

THETA = 500_000.0
"""Theta of sliding layers, whatever the config has beside the blocks: that value is for the full layers."""


def _read(config: HfConfig) -> ModelConfig:
    model = olmo_like(config, rope=_full_rope)
    types = layer_types(config, len(model.layers), _slides)
    sliding = read_rope_of(config, "sliding_attention", model.dims.head_dim, model.max_positions, THETA)
    layers = tuple(
        layer.turning(sliding) if kind == "sliding_attention" else layer
        for layer, kind in zip(model.layers, types, strict=True)
    )
    window = config.integer_or_none("sliding_window", 4096)
    return replace(model, layers=windowed(layers, config, window, _slides))


def _slides(index: int) -> bool:
    return (index + 1) % 4 != 0


def _full_rope(config: HfConfig, dim: int, longest: int) -> tuple[RopeSpec, int]:
    theta = config.number("rope_theta", THETA)
    return read_rope_of(config, "full_attention", dim, longest, theta), longest


FAMILY = Family(
    (Architecture("Olmo3ForCausalLM", "olmo3"),),
    _read,
    models="OLMo 3",
)
