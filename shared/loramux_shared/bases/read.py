"""The reader of a checkpoint's ``config.json``: describes a base that is served, or refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.family import Architecture, Family, token_ids
from loramux_shared.bases.formats.read import QUANTIZE, read_quantization, with_quantize
from loramux_shared.bases.geometry import refuse_other_geometry
from loramux_shared.bases.hf_config import HfConfig, read_json
from loramux_shared.faults import CheckpointInvalid


def read_config(folder: Path, max_seq_len: int | None = None) -> ModelConfig:
    """Read ``config.json`` of a folder and what stands beside it, as `read_fields` does.

    Raises:
        CheckpointInvalid: no such file, or a model that is not supported, with what is.
    """
    fields: Mapping[str, Any] | None = read_json(folder / "config.json")
    if fields is None:
        raise CheckpointInvalid("the base checkpoint has no config.json; expected a Hugging Face checkpoint.")
    fields = with_quantize(fields, read_json(folder / QUANTIZE))
    return read_fields(fields, read_json(folder / "generation_config.json") or {}, max_seq_len)


def read_fields(
    fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None, max_seq_len: int | None = None
) -> ModelConfig:
    """Describe a base from its ``config.json`` and its ``generation_config.json``.

    The name of the architecture is looked at before anything else. max_seq_len is what the deployment asks
    for; models with LongRoPE choose their factors by it.

    Raises:
        CheckpointInvalid: the model is not supported, with what is; or it contradicts itself.
    """
    architecture, family = _named(fields)
    text = fields.get("text_config")
    levels = fields, text if isinstance(text, dict) else {}
    quantization = read_quantization(*levels, architecture=architecture.name)
    decoder = _decoder(fields) if architecture.nested else dict(fields)
    refuse_other_geometry(decoder, family.describes)
    model = family.read(HfConfig(decoder, architecture.name, max_seq_len))
    ends = token_ids((generation or {}).get("eos_token_id"))
    return replace(model, eos_token_ids=ends or model.eos_token_ids, quantization=quantization)


def _named(fields: Mapping[str, Any]) -> tuple[Architecture, Family]:
    """Return the architecture that a config names, and its family."""
    named = fields.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "unknown"
    families = load_families()
    if name not in families:
        raise CheckpointInvalid(
            f"config.json: architecture {name} is not supported; supported: {', '.join(families)}."
        )
    architecture, family = families[name]
    model_type = fields.get("model_type")
    if model_type is not None and model_type != architecture.model_type:
        raise CheckpointInvalid(
            f"config.json: architectures names {name}, whose model_type is {architecture.model_type!r}, and "
            f"model_type is {model_type!r}: they contradict each other. Correct the one that is wrong."
        )
    return architecture, family


def _decoder(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the decoder of a model of more than text, as transformers takes them.

    They stand in ``text_config``. Whether the head is tied stands outside alone, and means true where it is
    not said; the type of the weights and the end of sequences are looked for outside first.
    """
    text = fields.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise CheckpointInvalid(f"config.json: text_config: expected an object, found {type(text).__name__}.")
    decoder = dict(text or {})
    tied = fields.get("tie_word_embeddings", True)
    decoder["tie_word_embeddings"] = False if tied is None else tied
    for keys in (("dtype", "torch_dtype"), ("eos_token_id",)):
        outside = {key: fields[key] for key in keys if fields.get(key) is not None}
        if outside:
            decoder = {key: value for key, value in decoder.items() if key not in keys} | outside
    return decoder
