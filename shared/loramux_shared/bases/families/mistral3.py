"""Mistral 3: a model with images, of which the text decoder is served, Mistral or Ministral 3."""

from __future__ import annotations

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import ministral3, mistral
from loramux_shared.bases.family import Architecture, Family
from loramux_shared.bases.hf_config import HfConfig

DECODERS = {"mistral": mistral.FAMILY, "ministral3": ministral3.FAMILY}
"""Decoder families by ``model_type`` of ``text_config``; the first is the default."""


def _read(config: HfConfig) -> ModelConfig:
    config.require("model_type", *DECODERS)
    model = DECODERS[config.text("model_type", "mistral")].read(config)
    prefixes = "language_model.model.", "model.language_model."
    return replace(
        model, names=replace(model.names, prefixes=prefixes, heads=("lm_head", "language_model.lm_head"))
    )


FAMILY = Family(
    (Architecture("Mistral3ForConditionalGeneration", "mistral3", nested=True),),
    _read,
    models="Mistral Small 3.1 and 3.2, Ministral 3",
)
