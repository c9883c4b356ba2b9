"""Mistral: every layer slides, where the config has a window."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.family import Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("layer_types", None)  # transformers reads them with another class, as Ministral
    model = llama_like(config, max_positions=131072, sizes={"num_key_value_heads": 8})
    window = config.integer_or_none("sliding_window", 4096)
    return replace(model, layers=windowed(model.layers, config, window, lambda _: True))


FAMILY = Family(
    (Architecture("MistralForCausalLM", "mistral"),),
    _read,
    models="Mistral 7B, Nemo",
)
