"""Configs that name an architecture that is served, and describe layers that it does not have."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Final

from loramux_shared.faults import CheckpointInvalid

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
    """Raise for a base that adapters of this version cannot be served on; some keys are described elsewhere.

    Raises:
        CheckpointInvalid: with the kind of base and the key that tells it.
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
