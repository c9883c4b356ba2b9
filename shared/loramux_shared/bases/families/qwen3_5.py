"""Qwen 3.5, dense: a gated delta rule in three layers of four, gated attention of partly turned heads between.

Of a checkpoint with images (``Qwen3_5ForConditionalGeneration``) the text decoder is served: for text, all
sections of its rope turn alike. What predicts several tokens (``mtp.``) is not read, as in transformers.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import read_experts
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import DeltaLayer
from loramux_shared.bases.rope import read_rope
from loramux_shared.faults import CheckpointInvalid

NAMES = TensorNames(
    prefixes=("model.", "model.language_model.", "language_model.model.", ""),
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)
SIZES = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 248320,
}
DELTA = frozenset({"full_attention_interval", "linear_num_key_heads", "layer_types"})
"""Keys of layers with a gated delta rule."""
KINDS = ("full_attention", "linear_attention")
ROPE = partial(read_rope, default_part=0.25)
"""Reader of the rotation of a part of each head."""
MAX_WIDTH = 8
"""Rows that a convolution sees."""


def qwen35_like(config: HfConfig, sizes: Mapping[str, int] = SIZES) -> ModelConfig:
    """Return the decoder with dense MLPs, which mixtures have too but for those; with the sizes of a class."""
    config.require("hidden_act", "silu")
    config.require("attn_output_gate", True)
    model = llama_like(config, max_positions=32768, sizes=sizes, rope=ROPE)
    delta = _delta(config)
    bias = config.flag("attention_bias", default=False)
    layers = [
        replace(layer, mixer=delta) if kind == "linear_attention" else layer.changing(gated=True)
        for layer, kind in zip(model.layers, _kinds(config, len(model.layers)), strict=True)
    ]
    return replace(model, layers=tuple(layers), names=NAMES, norm_offset=1.0, qkv_bias=bias, o_bias=bias)


def _kinds(config: HfConfig, num_layers: int) -> list[str]:
    """Return the kind of each layer."""
    every = config.size("full_attention_interval", 4)
    kinds = config.array("layer_types") or [KINDS[(index + 1) % every != 0] for index in range(num_layers)]
    if len(kinds) != num_layers or "full_attention" not in kinds or not {*kinds} <= {*KINDS}:
        raise CheckpointInvalid(
            f"config.json: layer_types: expected {num_layers} of {', '.join(KINDS)}, and one at least that "
            f"attends; found {len(kinds)} of {', '.join(sorted({str(kind) for kind in kinds}))}."
        )
    return kinds


def _delta(config: HfConfig) -> DeltaLayer:
    """Read the sizes of the delta rule."""
    delta = DeltaLayer(
        key_heads=config.size("linear_num_key_heads", 16),
        value_heads=config.size("linear_num_value_heads", 32),
        key_dim=config.size("linear_key_head_dim", 128),
        value_dim=config.size("linear_value_head_dim", 128),
        conv_width=config.size("linear_conv_kernel_dim", 4),
    )
    if delta.value_heads % delta.key_heads:
        raise CheckpointInvalid(
            f"config.json: linear_num_value_heads: expected a multiple of linear_num_key_heads "
            f"{delta.key_heads}, found {delta.value_heads}."
        )
    if not 2 <= delta.conv_width <= MAX_WIDTH:
        raise CheckpointInvalid(
            f"config.json: linear_conv_kernel_dim: expected 2 to {MAX_WIDTH}, found {delta.conv_width}."
        )
    return delta


FAMILY = Family(
    (
        Architecture("Qwen3_5ForCausalLM", "qwen3_5_text"),
        Architecture("Qwen3_5ForConditionalGeneration", "qwen3_5", nested=True, untied=True),
    ),
    qwen35_like,
    models="Qwen 3.5, dense",
    describes=DELTA,
)


OF_CLASS = SIZES | {
    "num_hidden_layers": 40,
    "hidden_size": 2048,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}


def _read_moe(config: HfConfig) -> ModelConfig:
    model = qwen35_like(config, OF_CLASS)
    experts = read_experts(config, renormalised=True, num=256, intermediate=512)
    experts = replace(experts, shared=config.size("shared_expert_intermediate_size", 512))
    return replace(model, layers=tuple(replace(layer, mlp=experts) for layer in model.layers))


FAMILY_MOE = Family(
    (
        Architecture("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
        Architecture("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", nested=True, untied=True),
    ),
    _read_moe,
    models="Qwen 3.5, mixtures of experts",
    describes=DELTA | EXPERTS,
)
