"""GLM-4: half of each head is rotated, in pairs of neighbours. GLM-4-0414: norms behind each block too."""

from dataclasses import replace
from functools import partial

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, llama_like, refuse_windows
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import read_rope

NAMES = TensorNames(gate_up=("mlp.gate_up_proj",))
SIZES = {
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "vocab_size": 151552,
}
ROPE = partial(read_rope, default_part=0.5)


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=131072, sizes=SIZES, rope=ROPE)
    refuse_windows(config, model)
    rope = replace(model.ropes[0], neighbours=True)
    return replace(
        model,
        dims=replace(model.dims, fused=frozenset({"gate_up_proj"})),
        layers=tuple(layer.changing(rope=rope) for layer in model.layers),
        names=NAMES,
        norm_eps=config.number("rms_norm_eps", 1.5625e-07),
        qkv_bias=config.flag("attention_bias", default=True),
    )


FAMILY = Family((Architecture("GlmForCausalLM", "glm"),), _read, models="GLM-4 9B, GLM-Edge")


def _read_4(config: HfConfig) -> ModelConfig:
    names = replace(NAMES, attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm")
    return replace(_read(config), names=names)


FAMILY_4 = Family((Architecture("Glm4ForCausalLM", "glm4"),), _read_4, models="GLM-4-0414, GLM-Z1")
