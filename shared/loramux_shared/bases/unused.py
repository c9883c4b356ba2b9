"""The tensors of a checkpoint that a base may have beside those of its decoder or encoder."""

import re
from collections.abc import Iterable, Iterator
from typing import Final

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.layers import AttentionLayer

TOWER: Final = re.compile(
    r"(?:^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|mm_projector|embed_vision|embed_audio)\."
)
"""Modules that see images or hear sound, which no text passes."""
OTHERS: Final = (
    TOWER,
    re.compile(r"(?:^|\.)mtp[._]"),  # predicts further tokens
    re.compile(r"^v(?:alue)?_head\."),  # tells the worth of a text to PPO, in TRL and OpenRLHF
    re.compile(r"\.rotary_emb\.\w+$"),  # frequencies, as early releases of transformers saved them
    re.compile(r"\.att(?:entio)?n\.(?:masked_)?bias$"),  # causal masks, likewise
    re.compile(r"(?:^|\.)embeddings\.position_ids$"),
    re.compile(
        r"[._](?:(?:weight_)?activation_scale|input_scale(?:_ub)?|input_zero_point)$"
    ),  # round activations
)
BESIDE_ENCODERS: Final = re.compile(
    r"(?:\w+\.)?(?:pooler|cls|lm_head|(?:pre_)?classifier|head|decoder|vocab_(?:transform|layer_norm|projector)"
    r"|mask_predictions|embeddings\.position_embeddings)\."
)
"""Heads of the tasks that an encoder was trained for, without which vectors are made, and the positions that
are left in a DeBERTa whose config has none.
"""
PREDICTS_FURTHER: Final = "eh_proj.weight"
"""A tensor of the layers behind the last one that predict further tokens."""


def unknown(names: Iterable[str], config: ModelConfig) -> list[str]:
    """Return the names, of tensors that a base does not use, that are none which it may have besides."""
    left = set(names)
    beside = tuple(_beside(config, left))
    return sorted(name for name in left if not name.startswith(beside) and not _is_other(name, config))


def _is_other(name: str, config: ModelConfig) -> bool:
    if config.encodes and BESIDE_ENCODERS.match(name):
        return True
    return any(pattern.search(name) for pattern in OTHERS)


def _beside(config: ModelConfig, left: set[str]) -> Iterator[str]:
    """Yield how names begin: of keys and values that no layer reads, and of layers that predict further."""
    names = config.names
    for prefix in names.prefixes:
        for index, layer in enumerate(config.layers):
            if isinstance(layer.mixer, AttentionLayer) and layer.mixer.attention.keys_of is not None:
                at = f"{prefix}{names.layer.format(index=index)}"
                yield from (f"{at}{own}." for own in (*names.qkv[1:], names.k_norm) if own is not None)
        index = len(config.layers)
        while f"{(at := prefix + names.layer.format(index=index))}{PREDICTS_FURTHER}" in left:
            yield at
            index += 1
