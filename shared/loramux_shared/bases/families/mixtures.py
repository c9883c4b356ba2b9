"""The families: GLM-4.5 to 4.7, DeepSeek V2 and V3, and Phi-3.5-MoE by their ``config.json``."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.qwen2 import NAMES as QK_NORMS, read_experts
from loramux_shared.bases.family import (
    EXPERTS,
    Architecture,
    Family,
    llama_like,
    refuse_windows,
    windowed,
)
from loramux_shared.bases.family_layers import LatentLayer, RoutedLayer
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import LayerSpec
from loramux_shared.bases.rope import (
    LongRope,
    RopeSpec,
    original_positions,
    read_longrope,
    read_rope,
    rope_block,
    rope_kind,
    rope_spec,
    yarn_mscale,
)
from loramux_shared.faults import CheckpointInvalid

SHARED: Final = "mlp.shared_experts"
ROUTED: Final = EXPERTS | {"n_routed_experts"}


def _routed(config: HfConfig, usual: RoutedLayer, *, grouped: bool = True) -> RoutedLayer:
    """Read a mixture beside experts for all rows; usual has what its class means, and the number of the latter.

    Raises:
        CheckpointInvalid: experts cannot be divided into groups, or fewer than a row has would be left.
    """
    width = config.size("moe_intermediate_size", usual.intermediate)
    spec = replace(
        usual,
        num=config.size("n_routed_experts", usual.num),
        top_k=config.size("num_experts_per_tok", usual.top_k),
        intermediate=width,
        shared=width * config.size("n_shared_experts", usual.shared),
        scaling=config.number("routed_scaling_factor", usual.scaling),
        renormalised=config.flag("norm_topk_prob", default=usual.renormalised),
        num_groups=config.size("n_group", usual.num_groups) if grouped else 1,
        top_groups=config.size("topk_group", usual.top_groups) if grouped else 1,
    )
    count, best = spec.num_groups, spec.top_groups
    if spec.num % count or best > count or best * (spec.num // count) < spec.top_k:
        raise CheckpointInvalid(
            f"config.json: n_routed_experts {spec.num}, n_group {count}, topk_group {best}: expected groups of "
            f"equal size, and num_experts_per_tok {spec.top_k} experts at least in the chosen ones."
        )
    return spec


def _with_experts(
    config: HfConfig, layers: Sequence[LayerSpec], spec: RoutedLayer, dense: int
) -> list[LayerSpec]:
    """Put a mixture into all layers but the first ones, which are so many where the config does not say."""
    first = config.integer("first_k_dense_replace", dense)
    return [layer if index < first else replace(layer, mlp=spec) for index, layer in enumerate(layers)]


GLM_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_attention_heads": 96,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "vocab_size": 151552,
}


def _read_glm(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    rope = partial(read_rope, default_part=0.5)
    model = llama_like(config, max_positions=131072, sizes=GLM_SIZES, rope=rope)
    refuse_windows(config, model)
    spec = _routed(config, RoutedLayer(128, 8, 1408, shared=1, corrected=True))
    names = QK_NORMS if config.flag("use_qk_norm", default=False) else TensorNames()
    return replace(
        model,
        layers=tuple(_with_experts(config, model.layers, spec, 1)),
        names=replace(names, shared_expert=SHARED),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=config.flag("attention_bias", default=False),
    )


GLM = Family(
    (Architecture("Glm4MoeForCausalLM", "glm4_moe"),),
    _read_glm,
    models="GLM-4.5 to 4.7, Air",
    describes=ROUTED,
)


DOTS_SIZES: Final = {
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "num_attention_heads": 32,
    "num_hidden_layers": 62,
    "num_key_value_heads": 32,
    "vocab_size": 152064,
}


def _read_dots(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(config, sizes=DOTS_SIZES)
    top_k = config.size("num_experts_per_tok")
    usual = RoutedLayer(128, top_k, 1408, shared=2, corrected=True, renormalised=False)
    window, first = config.integer_or_none("sliding_window", 4096), config.integer("max_window_layers", 62)
    layers = windowed(model.layers, config, window, lambda index: index >= first)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        layers=tuple(_with_experts(config, layers, _routed(config, usual), 0)),
        names=replace(QK_NORMS, shared_expert=SHARED),
        qkv_bias=bias,
        o_bias=bias,
    )


DOTS = Family(
    (Architecture("Dots1ForCausalLM", "dots1"),),
    _read_dots,
    models="dots.llm1",
    describes=ROUTED,
)


def _latent(config: HfConfig, sizes: dict[str, int], max_positions: int) -> ModelConfig:
    """Return a decoder with latent attention, and dense MLPs; sizes are those of its class."""
    config = HfConfig({**sizes, **config.fields}, config.architecture, config.max_seq_len)
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("moe_layer_freq", 1)
    turned, plain = config.size("qk_rope_head_dim", 64), config.size("qk_nope_head_dim", 128)
    dim, value_dim = turned + plain, config.size("v_head_dim", 128)
    if value_dim > dim:
        raise CheckpointInvalid(
            f"config.json: v_head_dim: expected at most qk_nope_head_dim + qk_rope_head_dim {dim}, found "
            f"{value_dim}."
        )

    def rope(config: HfConfig, _: int, longest: int) -> tuple[RopeSpec, int]:
        return read_rope(config, turned, longest)

    own = {"head_dim": dim, "num_key_value_heads": None}
    whole = HfConfig({**config.fields, **own}, config.architecture, config.max_seq_len)
    model = llama_like(whole, max_positions=max_positions, rope=rope)
    usual = model.attentions[0]
    mixer = LatentLayer(
        replace(usual.attention, scale=dim**-0.5 * _mscale(config) ** 2),
        replace(usual.rope, neighbours=config.flag("rope_interleave", default=True)),
        usual.num_heads,
        usual.num_heads,
        dim,
        q_rank=config.size("q_lora_rank", 1536)
        if config.integer_or_none("q_lora_rank", 1536) is not None
        else None,
        kv_rank=config.size("kv_lora_rank", 512),
        value_dim=value_dim,
    )
    refuse_windows(config, model)
    layers = tuple(replace(layer, mixer=mixer) for layer in model.layers)
    return replace(model, layers=layers, names=TensorNames(shared_expert=SHARED))


def _mscale(config: HfConfig) -> float:
    """Return the factor of queries and of keys that a scaled rope asks for."""
    block = rope_block(config)
    all_dim = block.number("mscale_all_dim", 0.0)
    kind = rope_kind(block)
    if kind == "default" or not all_dim:
        return 1.0
    return yarn_mscale(block.positive("factor"), all_dim)


V3_SIZES: Final = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
}


def _read_v3(config: HfConfig) -> ModelConfig:
    config.require("scoring_func", "sigmoid")
    config.require("topk_method", "noaux_tc")
    model = _latent(config, V3_SIZES, 4096)
    usual = RoutedLayer(256, 8, 2048, shared=1, corrected=True, num_groups=8, top_groups=4, scaling=2.5)
    spec = _routed(config, usual)
    return replace(model, layers=tuple(_with_experts(config, model.layers, spec, 3)))


LATENT: Final = ROUTED | {"kv_lora_rank", "q_lora_rank"}
V3 = Family(
    (Architecture("DeepseekV3ForCausalLM", "deepseek_v3", also="kimi_k2"),),
    _read_v3,
    models="DeepSeek V3 and R1, Kimi K2, Moonlight",
    describes=LATENT,
)

V2_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 102400,
}


def _read_v2(config: HfConfig) -> ModelConfig:
    config.require("scoring_func", "softmax")
    config.require("topk_method", "greedy", "group_limited_greedy")
    config.require("norm_topk_prob", False)  # transformers does not read it, and others do
    config.require("mlp_bias", False)
    config.require("rope_interleave", True)
    model = _latent(config, V2_SIZES, 2048)
    top_k = config.size("num_experts_per_tok")
    usual = RoutedLayer(64, top_k, 1407, renormalised=False, shared=2, scores="softmax")
    spec = _routed(config, usual, grouped=config.text("topk_method", "greedy") != "greedy")
    return replace(model, layers=tuple(_with_experts(config, model.layers, spec, 0)))


V2 = Family(
    (Architecture("DeepseekV2ForCausalLM", "deepseek_v2"),),
    _read_v2,
    models="DeepSeek V2 and V2-Lite, Coder V2",
    describes=LATENT,
)

LITE_SIZES: Final = {
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "num_attention_heads": 20,
    "num_hidden_layers": 47,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "vocab_size": 154880,
}
KINDS: Final = ("dense", "sparse")


def _read_glm_lite(config: HfConfig) -> ModelConfig:
    config.require("first_k_dense_replace", 1)
    config.require("topk_method", "noaux_tc")
    model = _latent(config, LITE_SIZES, 202752)
    spec = _routed(config, RoutedLayer(64, 4, 1536, shared=1, corrected=True, scaling=1.8))
    num = len(model.layers)
    kinds = config.array("mlp_layer_types") or ["dense", *["sparse"] * (num - 1)]
    if len(kinds) != num or not {*kinds} <= {*KINDS}:
        raise CheckpointInvalid(
            f"config.json: mlp_layer_types: expected {num} of {', '.join(KINDS)}, found {len(kinds)} of "
            f"{', '.join(sorted({*map(str, kinds)}))}."
        )
    layers = zip(model.layers, kinds, strict=True)
    mixed = tuple([replace(layer, mlp=spec) if kind == "sparse" else layer for layer, kind in layers])
    return replace(model, layers=mixed, norm_eps=config.number("rms_norm_eps", 1e-5))


GLM_LITE = Family(
    (Architecture("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),),
    _read_glm_lite,
    models="GLM-4.7-Flash",
    describes=LATENT,
)

PHI_NAMES: Final = TensorNames(
    router="block_sparse_moe.gate", experts="block_sparse_moe.experts", expert=("w1", "w3", "w2")
)
PHI_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32064,
}


def _read_phi(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    config.require("num_experts_per_tok", 2)
    model = llama_like(config, max_positions=131072, sizes=PHI_SIZES, rope=_rope_of_phi)
    sizes = read_experts(config, renormalised=True, num=16, top_k=2)
    jitter = config.number("router_jitter_noise", 0.01)
    spec = RoutedLayer(sizes.num, 2, model.dims.intermediate, scores="sparsemixer", jitter=jitter)
    window = config.integer_or_none("sliding_window", None)
    layers = windowed(model.layers, config, window, lambda _: True)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        layers=tuple(replace(layer, mlp=spec) for layer in layers),
        names=PHI_NAMES,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        layer_norm=True,
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        head_bias=config.flag("lm_head_bias", default=False),
    )


def _rope_of_phi(config: HfConfig, head_dim: int, longest: int) -> tuple[RopeSpec, int]:
    """Return the rope; with LongRoPE, magnitudes stand in the config beside the factors."""
    block = rope_block(config)
    if rope_kind(block) != "longrope":
        return read_rope(config, head_dim, longest, 1_000_000.0)
    original = original_positions(config, block, longest)
    scaling, longest = read_longrope(block, head_dim, longest, original)
    is_long = config.max_seq_len is not None and config.max_seq_len > original
    magnitude = block.positive("long_mscale" if is_long else "short_mscale")
    theta = block.number("rope_theta", config.number("rope_theta", 1_000_000.0))
    return rope_spec(head_dim, theta, LongRope(scaling.factors, magnitude)), longest


PHI = Family(
    (Architecture("PhimoeForCausalLM", "phimoe"), Architecture("PhiMoEForCausalLM", "phimoe")),
    _read_phi,
    models="Phi-3.5-MoE",
    describes=EXPERTS,
)
