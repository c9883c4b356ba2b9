"""Gemma 4, text: layers of two sizes, which may share keys and values, and inputs of tokens for every layer.

As Gemma 3 with plain norms, values normed too, no scale of products, and a rope that turns a part of larger
heads; some have a mixture of experts beside each MLP. Of a checkpoint with images and sound
(``Gemma4ForConditionalGeneration``) the text decoder is served: rows of text see what was before them, whatever
``use_bidirectional_attention`` says of images.
"""

from dataclasses import replace
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.gemma2 import NAMES
from loramux_shared.bases.family import EXPERTS, Architecture, Family, layer_types, llama_like
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import AttentionLayer, ExpertsLayer, InputLayer, LayerSpec, MlpLayer
from loramux_shared.bases.rope import RopeSpec, read_rope_of
from loramux_shared.faults import CheckpointInvalid

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES: Final = {
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 30,
    "num_key_value_heads": 4,
    "vocab_size": 262144,
}
ROPES: Final[dict[str, dict[str, Any]]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}
"""Defaults of a config without rope settings."""
DESCRIBES: Final = EXPERTS | {"global_head_dim", "num_global_key_value_heads", "per_layer_config"}
OF_LAYERS: Final = ("head_dim", "num_key_value_heads")
"""Fields in which layers may differ by ``per_layer_config``."""


def _read(config: HfConfig) -> ModelConfig:
    config.require("hidden_activation", "gelu_pytorch_tanh")
    config.require("use_bidirectional_attention", "vision")
    config.require("rope_scaling", None)
    model = llama_like(config, max_positions=131072, tied=True, sizes=SIZES, rope=_rope_of_full)
    bias = config.flag("attention_bias", default=False)
    names = replace(
        NAMES,
        prefixes=("model.", "model.language_model.", "language_model.model.", ""),
        heads=("lm_head", "language_model.lm_head"),
        q_norm="self_attn.q_norm",
        k_norm="self_attn.k_norm",
        router="router.proj",
        experts="experts",
        scalar="layer_scalar",
    )
    return replace(
        model,
        layers=_layers(config, model),
        names=names,
        qkv_bias=bias,
        o_bias=bias,
        activation="gelu_tanh",
        embedding_scale=model.dims.hidden**0.5,
        logit_softcap=config.number_or_none("final_logit_softcapping", None),
    )


def _layers(config: HfConfig, model: ModelConfig) -> tuple[LayerSpec, ...]:
    types = _types(config, model.dims.num_layers)
    mixers = {kind: _mixer(config, model, types, kind) for kind in dict.fromkeys(types)}
    unshared = len(types) - config.integer("num_kv_shared_layers", 0)
    own = types[: max(unshared, 0)]
    if not unshared <= len(types) or set(own) != set(types):
        raise CheckpointInvalid(
            f"config.json: num_kv_shared_layers {len(types) - unshared}: expected a layer of every type with "
            f"keys of its own, found {', '.join(sorted(set(own))) or 'none'}."
        )
    last = {kind: index for index, kind in enumerate(own)}
    double = config.flag("use_double_wide_mlp", default=False)
    inputs, experts, layers = _inputs(config, model), _experts(config), []
    for index, kind in enumerate(types):
        shares = index >= unshared
        width = model.dims.intermediate * (2 if double and shares else 1)
        mlp = MlpLayer(width) if experts is None else replace(experts, beside=width)
        layer = LayerSpec(mixers[kind], mlp, inputs)
        layers.append(layer.attending(keys_of=last[kind] if shares else None))
    return tuple(layers)


def _types(config: HfConfig, num_layers: int) -> list[str]:
    """Return the type of each layer; the last one sees everything, whatever is said of it."""
    types = layer_types(config, num_layers, lambda index: (index + 1) % 6 != 0)
    return [*types[:-1], FULL]


def _mixer(config: HfConfig, model: ModelConfig, types: list[str], kind: str) -> AttentionLayer:
    """Return how layers of a type attend."""
    slides = kind == SLIDING
    sizes = _sizes(config, types, kind)
    usual = model.attentions[0]
    dim, kv = sizes.size("head_dim", usual.head_dim), sizes.size("num_key_value_heads", usual.num_kv_heads)
    if usual.num_heads % kv:
        raise CheckpointInvalid(
            f"config.json: heads of keys of {kind}: expected a divisor of num_attention_heads "
            f"{usual.num_heads}, found {kv}."
        )
    return replace(
        usual,
        attention=replace(
            usual.attention, scale=1.0, window=config.size("sliding_window", 512) if slides else None
        ),
        rope=_rope(config, kind, dim, model.max_positions),
        num_kv_heads=kv,
        head_dim=dim,
        values_are_keys=not slides and config.flag("attention_k_eq_v", default=False),
        values_normed=True,
    )


def _sizes(config: HfConfig, types: list[str], kind: str) -> HfConfig:
    """Return what layers of a type have otherwise than the config says: of each layer, or of the full ones."""
    if "per_layer_config" in config.fields:
        per_layer = config.block("per_layer_config")
        keys = {key.lstrip("0") or "0": key for key in per_layer.fields}  # transformers writes 05
        found = [per_layer.block(keys.get(str(index), "")) for index, each in enumerate(types) if each == kind]
        for layer in found:
            beyond = sorted(set(layer.fields) - set(OF_LAYERS))
            if beyond or layer.fields != found[0].fields:
                raise CheckpointInvalid(
                    f"config.json: per_layer_config: supported: {' and '.join(OF_LAYERS)}, the same for all "
                    f"layers of a type; found {', '.join(beyond) or 'different ones'}."
                )
        return found[0]
    sizes: dict[str, Any] = {}
    if kind == FULL:
        sizes["head_dim"] = config.size("global_head_dim", 512)
        if config.flag("attention_k_eq_v", default=False):
            sizes["num_key_value_heads"] = config.fields.get("num_global_key_value_heads")
    return HfConfig(sizes, config.architecture)


def _inputs(config: HfConfig, model: ModelConfig) -> InputLayer | None:
    """Return what tokens give to layers."""
    width, vocab = config.integer("hidden_size_per_layer_input", 256), model.dims.vocab
    found = config.size("vocab_size_per_layer_input", 262144)
    if width and found < vocab:
        raise CheckpointInvalid(
            f"config.json: vocab_size_per_layer_input: expected at least vocab_size {vocab}, found {found}."
        )
    return InputLayer(width, found) if width else None


def _experts(config: HfConfig) -> ExpertsLayer | None:
    """Return the mixture that stands beside the MLP of every layer."""
    if not config.flag("enable_moe_block", default=False):
        return None
    num, top_k = config.size("num_experts"), config.size("top_k_experts")
    if top_k > num:
        raise CheckpointInvalid(
            f"config.json: top_k_experts: expected at most num_experts {num}, found {top_k}."
        )
    return ExpertsLayer(num, top_k, config.size("moe_intermediate_size"))


def _rope_of_full(config: HfConfig, dim: int, longest: int) -> tuple[RopeSpec, int]:
    return _rope(config, FULL, dim, longest), longest


def _rope(config: HfConfig, kind: str, dim: int, longest: int) -> RopeSpec:
    if config.fields.get("rope_parameters") is None:
        fields = {**config.fields, "rope_parameters": ROPES}
        config = HfConfig(fields, config.architecture, config.max_seq_len)
    theta = config.block("rope_parameters").block(kind).number("rope_theta")
    return read_rope_of(config, kind, dim, longest, theta)


FAMILY = Family(
    (
        Architecture("Gemma4ForCausalLM", "gemma4_text"),
        Architecture("Gemma4ForConditionalGeneration", "gemma4", nested=True),
    ),
    _read,
    models="Gemma 4",
    describes=DESCRIBES,
)
