"""The families, by their ``config.json``: Granite 4, Falcon-H1, Nemotron-H and Bamba."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.granite import NAMES as GRANITE_MOE, granite_like
from loramux_shared.bases.families.qwen2 import read_experts
from loramux_shared.bases.family import EXPERTS, Architecture, Family, llama_like, refuse_windows
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import LayerSpec, MlpLayer
from loramux_shared.bases.mamba_layers import MambaLayer, MlpMixer, NoMlp, ScaledMlp, SharedLayer, SideLayer
from loramux_shared.bases.rope import Still, read_rope
from loramux_shared.faults import CheckpointInvalid

ATTENDS: Final = "full_attention"
MIXES: Final = "linear_attention"
OLD_KINDS: Final = {"attention": ATTENDS, "mamba": MIXES}
"""Kinds of layers as configs named them before transformers 5."""
KINDS: Final = ("layer_types", "layers_block_type")
"""The fields that have the kind of each layer; the first that is there counts."""
MAMBA: Final = frozenset({*KINDS, "mamba_d_state"})
"""Keys of layers with a mixer."""


def _without(config: HfConfig, *keys: str, **others: Any) -> HfConfig:
    """Return a config without some fields, and with others."""
    fields = {key: value for key, value in config.fields.items() if key not in keys}
    return HfConfig({**fields, **others}, config.architecture, config.max_seq_len)


def _kinds(config: HfConfig, usual: Sequence[str], served: tuple[str, ...]) -> list[str]:
    """Return the kind of each layer; usual are those of a config that has none.

    Raises:
        CheckpointInvalid: a kind is not served, or no layer attends.
    """
    named = next((key for key in KINDS if config.fields.get(key) is not None), KINDS[0])
    kinds = [OLD_KINDS.get(str(kind), str(kind)) for kind in config.array(named) or usual]
    if ATTENDS not in kinds or not {*kinds} <= {*served}:
        raise CheckpointInvalid(
            f"config.json: {named}: expected layers of {', '.join(served)}, and one at least that attends; "
            f"found {', '.join(sorted({*kinds}))}."
        )
    return kinds


def _count(kinds: Sequence[str], model: ModelConfig) -> None:
    """Refuse a list of kinds that is not one for each layer."""
    if len(kinds) != len(model.layers):
        raise CheckpointInvalid(
            f"config.json: layer_types: expected one for each of num_hidden_layers {len(model.layers)}, found "
            f"{len(kinds)}."
        )


def _limits(config: HfConfig) -> tuple[float, float]:
    """Return the bounds of a row's step."""
    found = config.fields.get("time_step_limit", [0.0, math.inf])
    both = [_number(each) for each in found] if isinstance(found, list | tuple) else []
    if len(both) != 2 or not both[0] <= both[1]:
        raise CheckpointInvalid(
            f"config.json: time_step_limit: expected two numbers, the smaller one first, found {found!r}."
        )
    return both[0], both[1]


def _number(value: Any) -> float:
    """Return a number, or an infinite one as JSON has it; NaN for anything else."""
    if isinstance(value, dict):
        value = {"Infinity": math.inf, "-Infinity": -math.inf}.get(str(value.get("__float__")))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _mamba(config: HfConfig, features: int, out_bias: bool | None = None) -> MambaLayer:
    """Read a mixer whose values have so many features.

    Raises:
        CheckpointInvalid: the features are not those of its heads, or its groups do not divide these.
    """
    heads = config.size("mamba_n_heads", 128)
    automatic = config.fields.get("mamba_d_head", "auto") in ("auto", None)
    bias = config.flag("mamba_proj_bias", default=False)
    spec = MambaLayer(
        heads,
        features // heads if automatic else config.size("mamba_d_head"),
        config.size("mamba_n_groups", 1),
        config.size("mamba_d_state", 256),
        config.size("mamba_d_conv", 4),
        conv_bias=config.flag("mamba_conv_bias", default=True),
        in_bias=bias,
        out_bias=bias if out_bias is None else out_bias,
        step_limits=_limits(config),
    )
    if spec.features != features:
        raise CheckpointInvalid(
            f"config.json: mamba_n_heads {spec.heads}, mamba_d_head {spec.head_dim}: expected heads of "
            f"{features} features together, found {spec.features}."
        )
    return _divided(spec, "mamba_n_heads", "mamba_n_groups")


def _divided(spec: MambaLayer, heads: str, groups: str) -> MambaLayer:
    """Return a mixer whose groups have heads of equal number."""
    if spec.heads % spec.num_groups:
        raise CheckpointInvalid(
            f"config.json: {groups}: expected a divisor of {heads} {spec.heads}, found {spec.num_groups}."
        )
    return spec


def _mixed(model: ModelConfig, kinds: Sequence[str], mixer: MambaLayer) -> tuple[LayerSpec, ...]:
    """Return the layers with a mixer in the place of attention where they do not attend."""
    _count(kinds, model)
    layers = zip(model.layers, kinds, strict=True)
    return tuple([replace(layer, mixer=mixer) if kind == MIXES else layer for layer, kind in layers])


def _expanded(config: HfConfig, model: ModelConfig) -> int:
    """Return the features of a mixer, which are a multiple of the hidden ones."""
    return config.size("mamba_expand", 2) * model.dims.hidden


GRANITE_NAMES: Final = replace(
    GRANITE_MOE,
    gate_up=("shared_mlp.input_linear",),
    down="shared_mlp.output_linear",
    modules=(("shared_mlp.input_linear", "mlp.gate_up_proj"),),
)


def _read_granite(config: HfConfig) -> ModelConfig:
    config.require("position_embedding_type", None, "nope", "rope")
    model = granite_like(_without(config, *KINDS))
    kinds = _kinds(config, [MIXES] * len(model.layers), (ATTENDS, MIXES))
    layers = _mixed(model, kinds, _mamba(config, _expanded(config, model)))
    if config.text("position_embedding_type", "nope") != "rope":
        still = replace(model.ropes[0], scaling=Still())
        layers = tuple([layer.changing(rope=still) for layer in layers])
    shared = config.size("shared_intermediate_size", 1024)
    mlp: MlpLayer | SharedLayer = MlpLayer(shared)
    if config.integer("num_local_experts", 8):
        sizes = read_experts(_without(config, "num_experts"), renormalised=True, num=8, top_k=2)
        mlp = SharedLayer(sizes.num, sizes.top_k, model.dims.intermediate, beside=shared)
    return replace(
        model,
        dims=replace(model.dims, fused=frozenset({"gate_up_proj"})),
        layers=tuple([replace(layer, mlp=mlp) for layer in layers]),
        names=GRANITE_NAMES,
    )


GRANITE: Final = Family(
    (Architecture("GraniteMoeHybridForCausalLM", "granitemoehybrid"),),
    _read_granite,
    models="Granite 4",
    describes=MAMBA | EXPERTS,
)

FORWARD: Final = TensorNames(
    final_norm="final_layernorm",
    mlp_norm="pre_ff_layernorm",
    gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    modules=(("feed_forward.gate_proj", "mlp.gate_proj"), ("feed_forward.up_proj", "mlp.up_proj")),
)
FALCON_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128000,
}


def _read_falcon(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    model = llama_like(_without(config, *KINDS), max_positions=8192, sizes=FALCON_SIZES)
    refuse_windows(_without(config, *KINDS), model)
    features = config.integer_or_none("mamba_d_ssm", 1024)
    features = _expanded(config, model) if features is None else config.size("mamba_d_ssm", 1024)
    mamba = _mamba(config, features, config.flag("projectors_bias", default=False))
    gates_first = not config.flag("mamba_norm_before_gate", default=True)
    if config.flag("mamba_rms_norm", default=False):
        mamba = replace(mamba, gating="then norm" if gates_first else "behind norm")
    else:
        mamba = replace(mamba, gating="alone")
    mamba = replace(
        mamba,
        in_scale=config.number("ssm_in_multiplier", 1.0),
        part_scales=tuple(_factors(config, "ssm_multipliers", 5)),
        out_scale=config.number("ssm_out_multiplier", 1.0),
    )
    attends = model.attentions[0]
    keys = config.number("key_multiplier", 1.0)  # a factor of keys is one of products with them
    mixer = SideLayer(
        replace(attends.attention, scale=attends.attention.scale * keys),
        attends.rope,
        attends.num_heads,
        attends.num_kv_heads,
        attends.head_dim,
        mamba=mamba,
        in_scale=config.number("attention_in_multiplier", 1.0),
        out_scale=config.number("attention_out_multiplier", 1.0),
    )
    gate, down = _factors(config, "mlp_multipliers", 2)
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        layers=(LayerSpec(mixer, ScaledMlp(model.dims.intermediate, gate_scale=gate, out_scale=down)),)
        * len(model.layers),
        names=FORWARD,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        logit_divisor=1 / config.positive("lm_head_multiplier", 1.0),
    )


def _factors(config: HfConfig, key: str, count: int) -> list[float]:
    """Return so many numbers; ones where there are none."""
    found = config.numbers(key) or [1.0] * count
    if len(found) != count:
        raise CheckpointInvalid(f"config.json: {key}: expected {count} numbers, found {len(found)}.")
    return found


FALCON: Final = Family(
    (Architecture("FalconH1ForCausalLM", "falcon_h1"),),
    _read_falcon,
    models="Falcon-H1",
    describes=MAMBA,
)

NEMOTRON_NAMES: Final = TensorNames(
    prefixes=("backbone.", "model."),
    embedding="embeddings",
    final_norm="norm_f",
    input_norm="norm",
    qkv=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    o="mixer.o_proj",
    mlp_norm=None,
    gate_up=("mixer.up_proj",),
    down="mixer.down_proj",
    modules=(
        ("mixer.up_proj", "mlp.gate_proj"),
        ("mixer.in_proj", "mamba.in_proj"),
        ("mixer.out_proj", "mamba.out_proj"),
    ),
)
NEMOTRON_SIZES: Final = {
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}
PATTERN: Final = {"M": MIXES, "*": ATTENDS, "-": "mlp", "E": "moe"}
"""Kinds of layers by the letters of ``hybrid_override_pattern``."""
OLD_NAMES: Final = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
}
"""Fields that count before those with their present names, as in transformers."""


def _read_nemotron(config: HfConfig) -> ModelConfig:
    old = {new: config.fields[key] for key, new in OLD_NAMES.items() if key in config.fields}
    config = _without(config, *OLD_NAMES, **old)
    config.require("mamba_hidden_act", "silu")
    config.require("mlp_hidden_act", "relu2")
    for key in ("attention_bias", "residual_in_fp32", "tie_word_embeddings"):
        config.require(key, False)
    pattern = config.text("hybrid_override_pattern", "")
    usual = [PATTERN.get(letter, letter) for letter in pattern] or [MIXES, "moe", ATTENDS, "mlp"]
    kinds = _kinds(config, usual, (ATTENDS, MIXES, "mlp"))
    plain = _without(config, *KINDS, num_hidden_layers=len(kinds))
    model = llama_like(plain, max_positions=4096, sizes=NEMOTRON_SIZES)
    refuse_windows(plain, model)
    bias = config.flag("use_bias", default=False)
    heads = config.size("mamba_num_heads", 128)
    mamba = MambaLayer(
        heads,
        config.size("mamba_head_dim", 64),
        config.size("n_groups", 8),
        config.size("ssm_state_size", 128),
        config.size("conv_kernel", 4),
        conv_bias=config.flag("use_conv_bias", default=True),
        in_bias=bias,
        out_bias=bias,
        step_limits=_limits(config),
    )
    attends = replace(model.attentions[0], rope=replace(model.ropes[0], scaling=Still()))
    mixers = {
        MIXES: _divided(mamba, "mamba_num_heads", "n_groups"),
        ATTENDS: attends,
        "mlp": MlpMixer(model.dims.intermediate),
    }
    return replace(
        model,
        layers=tuple([LayerSpec(mixers[kind], NoMlp()) for kind in kinds]),
        names=NEMOTRON_NAMES,
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        mlp_bias=config.flag("mlp_bias", default=False),
    )


NEMOTRON: Final = Family(
    (Architecture("NemotronHForCausalLM", "nemotron_h"),),
    _read_nemotron,
    models="Nemotron-H, Nemotron Nano 2",
    describes=frozenset(
        {*KINDS, "hybrid_override_pattern", "mamba_num_heads", "n_routed_experts", "moe_intermediate_size"}
        | {"ssm_state_size"}
    ),
)

HALF: Final = partial(read_rope, default_part=0.5)


def _read_bamba(config: HfConfig) -> ModelConfig:
    config.require("hidden_act", "silu")
    plain = _without(config, *KINDS, "partial_rotary_factor")  # a half, whatever a config says
    model = llama_like(plain, max_positions=262144, sizes=FALCON_SIZES, rope=HALF)
    refuse_windows(plain, model)
    attending = config.array("attn_layer_indices") or []
    kinds = [ATTENDS if index in attending else MIXES for index in range(len(model.layers))]
    if ATTENDS not in kinds:
        raise CheckpointInvalid(
            f"config.json: attn_layer_indices: expected one at least below {len(kinds)}, found {attending}."
        )
    bias = config.flag("attention_bias", default=False)
    return replace(
        model,
        layers=_mixed(model, kinds, _mamba(config, _expanded(config, model))),
        names=FORWARD,
        norm_eps=config.number("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


BAMBA: Final = Family(
    (Architecture("BambaForCausalLM", "bamba"),),
    _read_bamba,
    models="Bamba",
    describes=MAMBA,
)
