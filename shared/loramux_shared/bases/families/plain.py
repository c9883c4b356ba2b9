"""Decoders whose MLPs have no gate, and an activation of their own: Arcee's AFM, and Apertus."""

from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import NAMES as QK_NORMS
from loramux_shared.bases.family import Architecture, Family, llama_like, refuse_windows
from loramux_shared.bases.family_layers import PlainLayer
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import read_rope, with_rope


def _plain(config: HfConfig, model: ModelConfig, activation: Literal["relu2", "xielu"]) -> ModelConfig:
    """Return a decoder with such MLPs."""
    config.require("hidden_act", activation)
    refuse_windows(config, model)
    mlp = PlainLayer(model.dims.intermediate, activation=activation)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        layers=tuple(replace(layer, mlp=mlp) for layer in model.layers),
        names=TensorNames(gate_up=("mlp.up_proj",)),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
    )


ARCEE_SIZES: Final = {
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}


def _read_arcee(config: HfConfig) -> ModelConfig:
    model = _plain(config, llama_like(config, max_positions=4096, sizes=ARCEE_SIZES), "relu2")
    return replace(model, mlp_bias=config.flag("mlp_bias", default=False))


ARCEE: Final = Family(
    (Architecture("ArceeForCausalLM", "arcee"),),
    _read_arcee,
    models="Arcee AFM 4.5B",
)

APERTUS_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 131072,
}
THETA: Final = 12_000_000.0
APERTUS_ROPE: Final[dict[str, Any]] = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
"""Default of a config without a rope block."""


def _read_apertus(config: HfConfig) -> ModelConfig:
    config.require("qk_norm", True)
    for key in ("post_norm", "mlp_bias"):
        config.require(key, False)
    config.require("head_dim", None)  # transformers takes no other than the usual one
    rope = partial(read_rope, default_theta=THETA)
    config = with_rope(config, APERTUS_ROPE)
    model = llama_like(config, max_positions=65536, sizes=APERTUS_SIZES, rope=rope)
    model = _plain(config, model, "xielu")
    names = replace(
        model.names,
        input_norm="attention_layernorm",
        mlp_norm="feedforward_layernorm",
        q_norm=QK_NORMS.q_norm,
        k_norm=QK_NORMS.k_norm,
    )
    return replace(model, names=names)


APERTUS: Final = Family(
    (Architecture("ApertusForCausalLM", "apertus"),),
    _read_apertus,
    models="Apertus",
)
