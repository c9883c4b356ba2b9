"""The reader of a checkpoint's ``config.json``: describes a base that is served, or refuses it."""

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.families.encoders import EncoderConfig
from loramux_shared.bases.family import Architecture, Family, labels_of, token_ids
from loramux_shared.bases.formats import QUANTIZE, read_quantization, with_quantize
from loramux_shared.bases.hf_config import HfConfig, read_json
from loramux_shared.bases.logit_score import logit_score_in
from loramux_shared.bases.splade import sparse_logs_in
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import FILE as POOLING
from loramux_shared.wording import nearest

SENTENCES: Final = "sentence_bert_config.json"
"""Config of sentence-transformers."""


def read_config(folder: Path, max_seq_len: int | None = None) -> ModelConfig:
    """Read ``config.json`` of a folder and what stands beside it, as `read_fields` does.

    An encoder has the longest sequence of its `SENTENCES`, unless the deployment asks for another. Raise
    CheckpointInvalid for no such file, or a model that is not supported, with what is.
    """
    fields: Mapping[str, Any] | None = read_json(folder / "config.json")
    if fields is None:
        raise CheckpointInvalid("the base checkpoint has no config.json; expected a Hugging Face checkpoint.")
    fields = with_quantize(fields, read_json(folder / QUANTIZE))
    model = read_fields(fields, read_json(folder / "generation_config.json") or {}, max_seq_len)
    if not isinstance(model, EncoderConfig):
        scored = logit_score_in(folder, model)
        return replace(model, logit_score=scored, for_vectors=(folder / POOLING).exists())
    model = replace(model, sparse_logs=sparse_logs_in(folder, model))
    if max_seq_len is not None:
        return model
    longest = (read_json(folder / SENTENCES) or {}).get("max_seq_length") or model.max_positions
    if not isinstance(longest, int) or longest < 1:
        raise CheckpointInvalid(
            f"{SENTENCES}: max_seq_length: expected a positive integer, found {longest!r:.80}."
        )
    return replace(model, max_positions=min(longest, model.max_positions))


def read_fields(
    fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None, max_seq_len: int | None = None
) -> ModelConfig:
    """Describe a base from its ``config.json`` and its ``generation_config.json``.

    The name of the architecture is looked at before anything else. max_seq_len is what the deployment asks for;
    models with LongRoPE choose their factors by it. Raise CheckpointInvalid for a model that is not supported,
    with what is, or that contradicts itself.
    """
    architecture, family = _named(fields)
    text = fields.get("text_config")
    levels = fields, text if isinstance(text, dict) else {}
    quantization = read_quantization(*levels, architecture=architecture.name)
    decoder = _decoder(fields, architecture) if architecture.nested else dict(fields)
    refuse_other_geometry(decoder, family.describes)
    model = family.read(HfConfig(decoder, architecture.name, max_seq_len))
    ends = token_ids((generation or {}).get("eos_token_id"))
    model = replace(model, eos_token_ids=ends or model.eos_token_ids, quantization=quantization)
    task = _task(fields)
    if not task:
        return model
    whole = HfConfig(fields, architecture.name)
    labels, kind = ((), None) if task == BARE else (labels_of(whole), whole.text("problem_type", "") or None)
    return replace(model, has_head=False, labels=labels, problem_type=kind)


def _named(fields: Mapping[str, Any]) -> tuple[Architecture, Family]:
    """Return the architecture that a config names, and its family."""
    name, families = _architecture(fields), load_families()
    if task := _task(fields):
        name = name.removesuffix(task) + GENERATES
    if name not in families:
        near = nearest(name.partition("For")[0], {known.partition("For")[0] for known in families})
        meant = f" The nearest name is that of {near}." if near else ""
        raise CheckpointInvalid(
            f"config.json: architecture {name:.80} is not supported; supported: {', '.join(families)}.{meant}"
        )
    architecture, family = families[name]
    model_type = fields.get("model_type")
    if model_type not in (None, architecture.model_type, architecture.also):
        raise CheckpointInvalid(
            f"config.json: architectures names {name}, whose model_type is {architecture.model_type!r}, and "
            f"model_type is {model_type!r:.80}: they contradict each other. Correct the one that is wrong."
        )
    return architecture, family


def _architecture(fields: Mapping[str, Any]) -> str:
    """Return the first name of ``architectures``."""
    named = fields.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "unknown"


GENERATES: Final = "ForCausalLM"
BARE: Final = "Model"
SCORES: Final = "ForSequenceClassification"
"""Ends of names of a decoder with the head of its vocabulary, without it, and with one that scores."""


def _task(fields: Mapping[str, Any]) -> str:
    """Return the end of the name of a decoder without the head of its vocabulary; empty for other models."""
    name, families = _architecture(fields), load_families()
    ends = (end for end in (BARE, SCORES) if name.endswith(end))
    return next(
        (end for end in ends if name not in families and name.removesuffix(end) + GENERATES in families), ""
    )


def _decoder(fields: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Return the fields of the decoder of a model of more than text, as transformers takes them.

    They stand in ``text_config``, or, of a flat one without it, outside. Whether the head is tied stands
    outside alone, except for a flat one, and means true unless the architecture says otherwise; the type of
    the weights and the end of sequences are looked for outside first.
    """
    flat, untied = architecture.flat, architecture.untied
    text = fields.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise CheckpointInvalid(f"config.json: text_config: expected an object, found {type(text).__name__}.")
    decoder = dict(fields) if flat and text is None else dict(text or {})
    tied = fields.get("tie_word_embeddings", not (flat or untied))
    tied = tied or (flat and not untied and decoder.get("tie_word_embeddings", False))
    decoder["tie_word_embeddings"] = False if tied is None else tied
    for keys in (("dtype", "torch_dtype"), ("eos_token_id",)):
        outside = {key: fields[key] for key in keys if fields.get(key) is not None}
        if outside:
            decoder = {key: value for key, value in decoder.items() if key not in keys} | outside
    return decoder


_ATTENTION: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
# Fields that only the config of such a base has, by kind. A count of at most 1, false and null are ignored.
_KINDS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "mixture of experts (MoE)",
        (
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_moe_experts",
            "moe_intermediate_size",
        ),
    ),
    ("multi-head latent attention (MLA)", ("kv_lora_rank", "q_lora_rank")),
    (
        "hybrid of attention and recurrent layers",
        (
            "attn_layer_period",
            "full_attention_interval",
            "hybrid_override_pattern",
            "layers_block_type",
            "linear_attn_config",
            "linear_num_key_heads",
            "mamba_d_state",
            "mamba_num_heads",
            "ssm_cfg",
            "ssm_state_size",
            "time_mix_extra_dim",
        ),
    ),
    (
        "decoder whose layers differ in their sizes",
        (
            "block_configs",
            "cross_attention_layers",
            "global_head_dim",
            "num_global_key_value_heads",
            "per_layer_config",
        ),
    ),
    ("encoder-decoder", ("is_encoder_decoder",)),
)


def refuse_other_geometry(fields: Mapping[str, Any], described: Set[str]) -> None:
    """Raise CheckpointInvalid, with the kind of base and its key, for a base on which no adapter can be served;
    some keys are described elsewhere.
    """
    for kind, keys in _KINDS:
        for key in keys:
            if key not in described and _says(fields.get(key)):
                raise CheckpointInvalid(_refusal(kind, key, fields[key]))
    for key in ("layer_types", "block_types"):
        kinds = None if key in described else fields.get(key)
        if isinstance(kinds, list) and (others := sorted({str(item) for item in kinds} - _ATTENTION)):
            raise CheckpointInvalid(_refusal("hybrid of attention and recurrent layers", key, others))


def _says(value: Any) -> bool:
    return value > 1 if isinstance(value, int) and not isinstance(value, bool) else bool(value)


def _refusal(kind: str, key: str, value: Any) -> str:
    found = str(value)
    found = found if len(found) <= 60 else found[:57] + "..."
    return (
        f"config.json: {key} is {found}: the base is a {kind}, and this version serves dense decoders whose "
        "layers are all alike. Serve an adapter of it merged into the base, with another server."
    )
