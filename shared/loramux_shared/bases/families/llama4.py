"""Llama 4, of which the text decoder is served: some layers know no positions, the others see one chunk."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like
from loramux_shared.bases.family_layers import RoutedLayer, TemperedLayer
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import LayerSpec, MlpLayer
from loramux_shared.bases.rope import QueryScaling, Still, read_rope
from loramux_shared.faults import CheckpointInvalid

NAMES: Final = TensorNames(
    prefixes=("language_model.model.", "model."),
    heads=("language_model.lm_head", "lm_head"),
    gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    router="feed_forward.router",
    experts="feed_forward.experts",
    shared_expert="feed_forward.shared_expert",
)
SIZES: Final = {
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "num_attention_heads": 40,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "vocab_size": 202048,
}
ROPE: Final = partial(read_rope, default_theta=500_000.0)
CHUNKED: Final = "chunked_attention"
KINDS: Final = ("full_attention", CHUNKED)


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=131072, sizes=SIZES, rope=ROPE)
    bias = config.flag("attention_bias", default=False)
    tempers = config.flag("attn_temperature_tuning", default=True)
    scaling = QueryScaling(config.number("attn_scale", 0.1), config.size("floor_scale", 8192), ahead=1)
    return replace(
        model,
        layers=tuple(_layers(config, model)),
        names=NAMES,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        query_scaling=scaling if tempers else None,
        qkv_bias=bias,
        o_bias=bias,
    )


def _layers(config: HfConfig, model: ModelConfig) -> list[LayerSpec]:
    """Return the layers."""
    num, usual = len(model.layers), model.attentions[0]
    chunk = config.integer_or_none("attention_chunk_size", 8192)
    turned, mixed = _turned(config, num), _mixed(config, num)
    dense = MlpLayer(config.size("intermediate_size_mlp", 16384))
    experts = _experts(config, model.dims.intermediate)
    normed = config.flag("use_qk_norm", default=True)
    if normed and usual.rope.scaling.magnitude != 1.0:
        raise CheckpointInvalid(
            f"config.json: use_qk_norm beside a rope of magnitude {usual.rope.scaling.magnitude} is not "
            f"supported for {config.architecture}; supported: a rope scaling of magnitude 1, as llama3."
        )
    full, chunked = usual.attention, replace(usual.attention, window=chunk, tumbling=True)
    rope = replace(usual.rope, neighbours=True)
    if chunk is not None and config.max_seq_len is not None and config.max_seq_len <= chunk:
        chunked = full  # all of a sequence is in its first chunk
    layers = []
    for index, kind in enumerate(_kinds(config, turned, chunk)):
        turns = turned[index]
        mixer = TemperedLayer(
            chunked if kind == CHUNKED else full,
            rope if turns else replace(rope, scaling=Still()),
            usual.num_heads,
            usual.num_kv_heads,
            usual.head_dim,
            normed=normed and turns,
            tempered=not turns,
        )
        layers.append(LayerSpec(mixer, experts if index in mixed else dense))
    return layers


def _experts(config: HfConfig, width: int) -> RoutedLayer:
    return RoutedLayer(
        config.size("num_local_experts", 16),
        config.size("num_experts_per_tok", 1),
        width,
        renormalised=False,
        shared=width,
        transposed=True,
        scales_inputs=True,
    )


def _turned(config: HfConfig, num: int) -> list[bool]:
    """Return which layers have a rope."""
    interval = config.size("no_rope_layer_interval", 4)
    flags = config.array("no_rope_layers") or [int((index + 1) % interval != 0) for index in range(num)]
    if len(flags) != num or not all(flag in (0, 1) for flag in flags):
        raise _unexpected("no_rope_layers", f"0 or 1 for each of {num} layers", flags)
    return [bool(flag) for flag in flags]


def _mixed(config: HfConfig, num: int) -> set[int]:
    """Return the layers that have experts."""
    step = config.size("interleave_moe_layer_step", 1)
    layers = config.array("moe_layers")
    layers = [*range(step - 1, num, step)] if layers is None else layers
    if not all(isinstance(layer, int) and 0 <= layer < num for layer in layers):
        raise _unexpected("moe_layers", f"numbers of {num} layers", layers)
    return set(layers)


def _kinds(config: HfConfig, turned: Sequence[bool], chunk: int | None) -> list[str]:
    """Return the kind of attention of each layer."""
    usual = [KINDS[turns and chunk is not None] for turns in turned]
    kinds = usual if (found := config.array("layer_types")) is None else [str(kind) for kind in found]
    served = KINDS[: 1 if chunk is None else 2]
    if len(kinds) != len(turned) or not {*kinds} <= {*served}:
        raise _unexpected("layer_types", f"{len(turned)} of {', '.join(served)}", kinds)
    return kinds


def _unexpected(key: str, expected: str, found: Sequence[Any]) -> CheckpointInvalid:
    text = ", ".join(str(each) for each in found[:8])
    return CheckpointInvalid(f"config.json: {key}: expected {expected}, found {len(found)}: {text}.")


FAMILY = Family(
    (
        Architecture("Llama4ForConditionalGeneration", "llama4", nested=True, flat=True),
        Architecture("Llama4ForCausalLM", "llama4_text"),
    ),
    _read,
    models="Llama 4 Scout and Maverick",
    describes=EXPERTS,
)
