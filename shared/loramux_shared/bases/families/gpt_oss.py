"""gpt-oss: attention with sinks, of which every other layer slides, and mixtures of experts with biases."""

from dataclasses import replace
from functools import partial
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import read_experts
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import ClampedGate
from loramux_shared.bases.rope import read_rope, with_rope

NAMES: Final = TensorNames(sinks="self_attn.sinks", router="mlp.router")
SIZES: Final = {"num_key_value_heads": 8, "head_dim": 64}
ROPE: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Default of a config without a rope block."""


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    rope = partial(read_rope, default_theta=150_000.0)
    model = llama_like(with_rope(config, ROPE), max_positions=131072, sizes=SIZES, rope=rope)
    window = config.integer_or_none("sliding_window", 128)
    experts = replace(
        read_experts(config, renormalised=True, top_k=4),
        intermediate=model.dims.intermediate,
        gate=ClampedGate(config.number("swiglu_alpha", 1.702), config.number("swiglu_limit", 7.0)),
        bias=True,
        in_turns=True,
    )
    layers = windowed(model.layers, config, window, lambda index: index % 2 == 0)
    bias = config.flag("attention_bias", default=True)
    return replace(
        model,
        layers=tuple(replace(layer, mlp=experts) for layer in layers),
        names=NAMES,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
    )


FAMILY = Family((Architecture("GptOssForCausalLM", "gpt_oss"),), _read, models="gpt-oss", describes=EXPERTS)
