"""StarCoder 2: layer norms, biases, and no gate in the MLP."""

from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, llama_like, plain_mlps, windowed
from loramux_shared.bases.hf_config import HfConfig

SIZES = {
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_attention_heads": 24,
    "num_hidden_layers": 30,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
}


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "gelu_pytorch_tanh", "gelu_new")
    config.require("layer_types", None)
    model = llama_like(config, max_positions=4096, tied=True, sizes=SIZES)
    window = config.integer_or_none("sliding_window", None)
    bias = config.flag("use_bias", default=True)
    return replace(
        model,
        layers=windowed(plain_mlps(model), config, window, lambda _: True),
        names=TensorNames(gate_up=("mlp.c_fc",), down="mlp.c_proj"),
        norm_eps=config.number("norm_epsilon", 1e-5),
        layer_norm=True,
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        activation="gelu_tanh",
    )


FAMILY = Family(
    (Architecture("Starcoder2ForCausalLM", "starcoder2"),),
    _read,
    models="StarCoder 2",
)
