"""MPNet: a RoBERTa without types of tokens, whose scores have a bias of each distance between positions."""

from dataclasses import dataclass, replace
from typing import Final

from loramux_shared.bases.families.encoders import (
    LM_HEAD,
    SIZES,
    TASKS,
    EncoderConfig,
    HeadLayers,
    architectures,
    extend,
    read_bert,
)
from loramux_shared.bases.family import Family
from loramux_shared.bases.hf_config import HfConfig

PADDING: Final = 1
"""The token that has no position of its own, whatever the config says."""


@dataclass(frozen=True)
class BiasedConfig(EncoderConfig):
    """An encoder whose heads have biases of distances, the same in all layers."""

    buckets: int = 32
    """Rows of the table of biases, half of them for positions before a row's."""
    farthest: int = 128
    """The distance from which on all have the same bias."""


def _read(config: HfConfig) -> BiasedConfig:
    config.require("relative_attention_num_buckets", BiasedConfig.buckets)
    found = read_bert(config, "mpnet.", SIZES | {"vocab_size": 30527})
    names = replace(
        found.names,
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        o="attention.attn.o",
        attention_out_norm="attention.LayerNorm",
    )
    own = {
        "names": names,
        "token_types": 0,
        "max_positions": found.table_rows - PADDING - 1,
        "padding": PADDING,
        "text_head": HeadLayers("classifier.out_proj", "classifier.dense"),
        "vocabulary_head": LM_HEAD,
    }
    return extend(BiasedConfig, found, own)


MPNET: Final = Family(architectures("MPNet", "mpnet", *TASKS), _read)
