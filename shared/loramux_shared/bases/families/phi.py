"""Phi-1 to Phi-2: attention and MLP side by side behind one layer norm, biases, no gate in the MLP."""

from dataclasses import replace
from functools import partial

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, llama_like, plain_mlps, refuse_windows
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import read_rope

NAMES = TensorNames(
    final_norm="final_layernorm", o="self_attn.dense", mlp_norm=None, gate_up=("mlp.fc1",), down="mlp.fc2"
)
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "vocab_size": 51200,
}
ROPE = partial(read_rope, default_part=0.5)


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "gelu_new", "gelu_pytorch_tanh")
    config.require("qk_layernorm", False)
    model = llama_like(config, sizes=SIZES, rope=ROPE)
    refuse_windows(config, model)
    return replace(
        model,
        layers=plain_mlps(model),
        names=NAMES,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        layer_norm=True,
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel=True,
        activation="gelu_tanh",
    )


FAMILY = Family((Architecture("PhiForCausalLM", "phi"),), _read, models="Phi-1, Phi-1.5, Phi-2")
