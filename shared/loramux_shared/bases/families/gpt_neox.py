"""GPT-NeoX, as Pythia: layer norms, biases, plain MLPs, and one linear with the projections of each head."""

from dataclasses import replace
from functools import partial
from typing import Literal

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, llama_like, plain_mlps, refuse_windows
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import read_rope

NAMES = TensorNames(
    prefixes=("gpt_neox.", ""),
    embedding="embed_in",
    final_norm="final_layer_norm",
    heads=("lm_head", "embed_out"),
    qkv=("attention.query_key_value",),
    o="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
SIZES = {
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "vocab_size": 50432,
}
ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Activations between the linears of an MLP, and what computes them."""
ROPE = partial(read_rope, default_part=0.25)
NOT_READ = {"head_dim", "num_key_value_heads", "partial_rotary_factor", "rope_theta"}
"""Fields that no class of this family has; the last two have other names."""


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", *ACTIVATIONS)
    fields = {key: value for key, value in config.fields.items() if key not in NOT_READ}
    fields["partial_rotary_factor"] = config.number("rotary_pct", 0.25)
    fields["rope_theta"] = config.number("rotary_emb_base", 10000.0)
    model = llama_like(HfConfig(fields, config.architecture, config.max_seq_len), sizes=SIZES, rope=ROPE)
    refuse_windows(config, model)
    bias = config.flag("attention_bias", default=True)
    layers = [replace(each, mixer=replace(model.attentions[0], by_head=True)) for each in plain_mlps(model)]
    return replace(
        model,
        layers=tuple(layers),
        names=NAMES,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        layer_norm=True,
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        parallel=config.flag("use_parallel_residual", default=True),
        activation=ACTIVATIONS[config.text("hidden_act", "gelu")],
    )


FAMILY = Family(
    (Architecture("GPTNeoXForCausalLM", "gpt_neox"),),
    _read,
    models="GPT-NeoX, Pythia",
)
