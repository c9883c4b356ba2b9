"""DistilBERT: a BERT without types of tokens, under names of its own."""

from dataclasses import replace
from typing import Final

from loramux_shared.bases.families.encoders import (
    ACTIVATIONS,
    TASKS,
    EncoderConfig,
    HeadLayers,
    VocabularyHead,
    architectures,
    read_bert,
)
from loramux_shared.bases.family import Family
from loramux_shared.bases.hf_config import HfConfig

PREFIX: Final = "distilbert."
KEYS: Final = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "activation": "hidden_act",
}
"""Keys of its config, with those of BERT's."""


def _read(config: HfConfig) -> EncoderConfig:
    config.require("activation", *ACTIVATIONS)
    fields = {"num_hidden_layers": 6, **config.fields, "layer_norm_eps": 1e-12}
    fields |= {usual: fields[own] for own, usual in KEYS.items() if own in fields}
    found = read_bert(HfConfig(fields, config.architecture, config.max_seq_len), PREFIX)
    names = replace(
        found.names,
        layer="transformer.layer.{index}.",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        o="attention.out_lin",
        attention_out_norm="sa_layer_norm",
        gate_up=("ffn.lin1",),
        down="ffn.lin2",
        mlp_out_norm="output_layer_norm",
    )
    head = HeadLayers(dense="pre_classifier", activation="relu")
    predicts = VocabularyHead("vocab_transform", "vocab_layer_norm", "vocab_projector.bias")
    return replace(found, names=names, token_types=0, text_head=head, vocabulary_head=predicts)


DISTILBERT: Final = Family(architectures("DistilBert", "distilbert", *TASKS), _read)
