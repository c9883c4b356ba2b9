"""Qwen 2 and 2.5: a bias on queries, keys and values. Qwen 3: a norm of every query and key head.

Mixtures of experts of Qwen 3 have experts in most layers instead of one MLP.
"""

from collections.abc import Sequence
from dataclasses import replace

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like, windowed
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import ExpertsLayer, LayerSpec
from loramux_shared.faults import CheckpointInvalid


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes={"num_key_value_heads": 32})
    return replace(model, layers=qwen_windows(model, config), qkv_bias=True)


def qwen_windows(model: ModelConfig, config: HfConfig, first: int = 28) -> tuple[LayerSpec, ...]:
    """Return the layers with their windows, which Qwen 3 has too; first is the default of the first one."""
    if not config.flag("use_sliding_window", default=False):
        return model.layers
    first = config.integer("max_window_layers", first)
    window = config.integer_or_none("sliding_window", 4096)
    return windowed(model.layers, config, window, lambda index: index >= first)


FAMILY = Family((Architecture("Qwen2ForCausalLM", "qwen2"),), _read, models="Qwen 2 and 2.5, dense")


NAMES = TensorNames(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def _read_3(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, max_positions=32768, sizes={"num_key_value_heads": 32, "head_dim": 128})
    bias = config.flag("attention_bias", default=False)
    layers = qwen_windows(model, config)
    return replace(model, layers=layers, names=NAMES, qkv_bias=bias, o_bias=bias)


FAMILY_3 = Family((Architecture("Qwen3ForCausalLM", "qwen3"),), _read_3, models="Qwen 3, dense")


def _read_moe(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144}
    model = llama_like(config, max_positions=32768, sizes=sizes)
    window = None
    if config.flag("use_sliding_window", default=False):
        window = config.integer_or_none("sliding_window", 4096)
    layers = [layer.attending(window=window) for layer in model.layers]
    experts = read_experts(config, renormalised=config.flag("norm_topk_prob", default=False))
    bias = config.flag("attention_bias", default=False)
    return replace(model, layers=with_experts(config, layers, experts), names=NAMES, qkv_bias=bias, o_bias=bias)


def read_experts(
    config: HfConfig, *, renormalised: bool, num: int = 128, top_k: int = 8, intermediate: int = 768
) -> ExpertsLayer:
    """Read the sizes of a mixture, by default those of its class; their number stands under either name.

    Raises:
        CheckpointInvalid: a size is no positive integer, or a row has more experts than there are.
    """
    name = "num_local_experts" if config.fields.get("num_experts") is None else "num_experts"
    count, chosen = config.size(name, num), config.size("num_experts_per_tok", top_k)
    if chosen > count:
        raise CheckpointInvalid(
            f"config.json: num_experts_per_tok: expected at most {name} {count}, found {chosen}."
        )
    return ExpertsLayer(count, chosen, config.size("moe_intermediate_size", intermediate), renormalised)


def with_experts(config: HfConfig, layers: Sequence[LayerSpec], experts: ExpertsLayer) -> tuple[LayerSpec, ...]:
    """Put a mixture into every layer but those that the config keeps dense."""
    dense = config.array("mlp_only_layers") or []
    every = config.size("decoder_sparse_step", 1)
    return tuple(
        layer if index in dense or (index + 1) % every else replace(layer, mlp=experts)
        for index, layer in enumerate(layers)
    )


FAMILY_MOE = Family(
    (Architecture("Qwen3MoeForCausalLM", "qwen3_moe"),),
    _read_moe,
    models="Qwen 3, mixtures of experts",
    describes=EXPERTS,
)
