"""From a checkpoint's folder to its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shared.bases.config import ModelConfig
from shared.bases.families import load_families
from shared.bases.family import token_ids
from shared.bases.hf_config import HfConfig, read_json
from shared.faults import CheckpointInvalid


def read_config(folder: Path, max_seq_len: int | None = None) -> ModelConfig:
    """Read ``config.json`` and the end-of-sequence tokens of ``generation_config.json``.

    max_seq_len is what the deployment asks for; models with LongRoPE choose their factors by it.

    Raises:
        CheckpointInvalid: no such file, or a model that is not supported, with what is.
    """
    fields = read_json(folder / "config.json")
    if fields is None:
        raise CheckpointInvalid("the base checkpoint has no config.json; expected a Hugging Face checkpoint.")
    named = fields.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "unknown"
    families = load_families()
    if architecture not in families:
        raise CheckpointInvalid(
            f"config.json: architecture {architecture} is not supported; supported: {', '.join(families)}."
        )
    if fields.get("quantization_config"):
        raise CheckpointInvalid(
            "config.json: quantization_config is not supported; supported are weights in bfloat16, float16 "
            "or float32."
        )
    generation = read_json(folder / "generation_config.json") or {}
    eos = token_ids(fields.get("eos_token_id")) | token_ids(generation.get("eos_token_id"))
    text = fields.get("text_config")  # a model of more than text keeps its decoder's fields there
    fields |= text if isinstance(text, dict) else {}
    model = families[architecture].read(HfConfig(fields, architecture, max_seq_len))
    return replace(model, eos_token_ids=model.eos_token_ids | eos)
