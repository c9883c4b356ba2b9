"""SmolLM 3: Llama with some layers that know no positions; those slide where there is a window."""

from dataclasses import replace
from functools import partial

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.family import Architecture, Family, layer_types, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import Still, read_rope
from loramux_shared.faults import CheckpointInvalid

ROPE = partial(read_rope, default_theta=2_000_000.0)


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, tied=True, sizes={"num_key_value_heads": 4}, rope=ROPE)
    turned = _turned(config, len(model.layers))
    layers = tuple(
        layer if turns else layer.changing(rope=replace(model.ropes[0], scaling=Still()))
        for layer, turns in zip(model.layers, turned, strict=True)
    )
    if config.flag("use_sliding_window", default=False):
        window = config.integer_or_none("sliding_window", None)
        layers = windowed(layers, config, window, lambda index: not turned[index])
    elif "sliding_attention" in layer_types(config, len(layers), lambda _: False):
        config.require("layer_types", None)
    bias = config.flag("attention_bias", default=False)
    mlp_bias = config.flag("mlp_bias", default=False)
    return replace(model, layers=layers, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _turned(config: HfConfig, num_layers: int) -> list[bool]:
    """Return which layers have a rope."""
    interval = config.size("no_rope_layer_interval", 4)
    without_rope = config.array("no_rope_layers")
    if without_rope is None:
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if len(without_rope) < num_layers or not all(item in (0, 1) for item in without_rope):
        raise CheckpointInvalid(
            f"config.json: no_rope_layers: expected 0 or 1 for each of {num_layers} layers."
        )
    return [bool(item) for item in without_rope[:num_layers]]


FAMILY = Family((Architecture("SmolLM3ForCausalLM", "smollm3"),), _read, models="SmolLM 3")
