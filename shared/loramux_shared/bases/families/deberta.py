"""DeBERTa-v2 and v3: scores add those of queries and of keys with embeddings of the distances between them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from loramux_shared.bases.families.encoders import (
    POOLER,
    TASKS,
    EncoderConfig,
    HeadLayers,
    architectures,
    extend,
    read_bert,
)
from loramux_shared.bases.family import Family
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid

SIZES: Final = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
}
SUMS: Final = 3
"""Scores that are added up: of content with content, and of either with distances."""
DEFAULTS: Final = {"layer_norm_eps": 1e-7, "relative_attention": False, "share_att_key": False}
"""Values of keys that a config leaves out, where they are others than BERT's or than what is served."""
POOLER_ACTIVATIONS: Final[Mapping[str, Literal["relu", "gelu"] | None]] = {
    "gelu": "gelu",
    "relu": "relu",
    "tanh": None,
}


@dataclass(frozen=True)
class DisentangledConfig(EncoderConfig):
    """An encoder whose linears of queries and keys also read embeddings of distances, shared by all layers."""

    span: int = 512
    """Rows of the table for distances to each side."""
    buckets: int | None = None
    """Twice the distance from which on several share a row; None: each has its own."""
    farthest: int = 512
    """The distance by which buckets grow up to the span."""
    distance_norm: bool = False
    """True if the embeddings of distances are normed."""


def _read(config: HfConfig) -> DisentangledConfig:
    config = HfConfig(DEFAULTS | dict(config.fields), config.architecture, config.max_seq_len)
    kept = {key: value for key, value in config.fields.items() if key != "type_vocab_size"}
    found = read_bert(HfConfig(kept, config.architecture), "deberta.", SIZES)
    for key in ("relative_attention", "share_att_key"):
        config.require(key, True)
    config.require("conv_kernel_size", 0)
    config.require("attention_head_size", found.dims.head_dim)
    for key in ("embedding_size", "pooler_hidden_size"):
        config.require(key, found.dims.hidden)
    config.require("norm_rel_ebd", "none", "layer_norm")
    _require_both_sides(config)
    rows = config.size("max_position_embeddings", 512)
    farthest, buckets = (config.integer(key, -1) for key in ("max_relative_positions", "position_buckets"))
    farthest = rows if farthest < 1 else farthest
    if buckets > 0 and not 0 < buckets // 2 < farthest - 1:
        raise CheckpointInvalid(
            f"config.json: position_buckets: expected 2 to {2 * farthest - 4} for max_relative_positions "
            f"{farthest}, or -1, found {buckets}."
        )
    scale = (SUMS * found.dims.head_dim) ** -0.5
    own: dict[str, Any] = {
        "names": replace(
            found.names, qkv=tuple(f"attention.self.{each}_proj" for each in ("query", "key", "value"))
        ),
        "layers": tuple(layer.attending(scale=scale) for layer in found.layers),
        "token_types": config.size("type_vocab_size") if config.fields.get("type_vocab_size") else 0,
        "table_rows": rows if config.flag("position_biased_input", default=True) else 0,
        "span": buckets if buckets > 0 else farthest,
        "buckets": buckets if buckets > 0 else None,
        "farthest": farthest,
        "distance_norm": config.text("norm_rel_ebd", "none") == "layer_norm",
        "text_head": _pooler(config),
        "vocabulary_head": None,
    }
    return extend(DisentangledConfig, found, own)


def _require_both_sides(config: HfConfig) -> None:
    """Refuse scores without a part: of queries with distances, or of keys."""
    names = config.fields.get("pos_att_type") or []
    parts = names.lower().split("|") if isinstance(names, str) else names
    if not isinstance(parts, list) or sorted(map(str.strip, map(str, parts))) != ["c2p", "p2c"]:
        raise CheckpointInvalid(
            f"config.json: pos_att_type {names!r:.80} is not supported for {config.architecture}; supported: "
            '["p2c", "c2p"].'
        )


def _pooler(config: HfConfig) -> HeadLayers:
    """Return the score head of texts; it has no layers where its activation is not served."""
    activation = config.text("pooler_hidden_act", "gelu")
    if config.architecture.endswith("ForSequenceClassification"):
        config.require("pooler_hidden_act", *POOLER_ACTIVATIONS)
    if activation not in POOLER_ACTIVATIONS:
        return HeadLayers("")
    return HeadLayers(dense=POOLER, activation=POOLER_ACTIVATIONS[activation])


DEBERTA: Final = Family(architectures("DebertaV2", "deberta-v2", *TASKS), _read)
