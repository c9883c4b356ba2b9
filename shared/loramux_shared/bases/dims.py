"""The sizes of a decoder, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bundle.modules import BaseDims
from loramux_shared.faults import CheckpointInvalid

MAX_LAYERS: Final = 4096
"""Beyond it a config is not believed: each layer is described on its own."""


def read_dims(config: HfConfig, defaults: Mapping[str, int]) -> BaseDims:
    """Read the sizes; defaults are what transformers means by those that a config of the family leaves out.

    Raises:
        CheckpointInvalid: a size is missing or no positive integer, or they do not go together.
    """
    config = HfConfig({**defaults, **config.fields}, config.architecture, config.max_seq_len)
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    dims = BaseDims(
        num_layers=config.size("num_hidden_layers"),
        hidden=hidden,
        intermediate=config.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.size("head_dim", hidden // heads),
        vocab=config.size("vocab_size"),
    )
    if dims.num_layers > MAX_LAYERS:
        raise CheckpointInvalid(
            f"config.json: num_hidden_layers: expected at most {MAX_LAYERS}, found {dims.num_layers}."
        )
    if dims.num_heads % dims.num_kv_heads:
        raise CheckpointInvalid(
            f"config.json: num_key_value_heads: expected a divisor of num_attention_heads {dims.num_heads}, "
            f"found {dims.num_kv_heads}."
        )
    return dims
