"""Encoders as BERT is, but whose heads are rotated: GTE, Nomic Embed and Jina v3.

Their checkpoints have the names of the code that came with them, and one tensor of queries, keys and values.
Adapters name modules as that code does, or as transformers does, which has three.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.families.encoders import (
    LM_HEAD,
    TASKS,
    EncoderConfig,
    HeadLayers,
    VocabularyHead,
    architectures,
    extend,
    read_bert,
)
from loramux_shared.bases.family import Family
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.layers import MlpLayer
from loramux_shared.bases.rope import LinearScaling, RopeSpec, read_rope, rope_block, rope_kind, rope_spec
from loramux_shared.bundle.modules import BY_NAME

PARTS: Final = tuple([BY_NAME[name].path for name in ("attn_q", "attn_k", "attn_v")])
QKV, UP_GATE = "self_attn.qkv_proj", "mlp.gate_up_proj"
OUT, UP, GATE, DOWN = (BY_NAME[name].path for name in ("attn_dense", "mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h"))
"""Paths of the linears of a layer; the second half of a gated MLP is the one that is activated."""
KEPT: Final = ((OUT, OUT), (DOWN, DOWN))
GATED: Final = (*KEPT, (GATE, UP), (UP, GATE))
"""Names of transformers. It calls the half that is activated the gate, which most decoders have first."""


@dataclass(frozen=True)
class RotatedConfig(EncoderConfig):
    """An encoder whose positions are in rotations of queries and keys."""

    def path(self, module: str) -> str:
        """Return transformers' name of a module within a layer, by its bundle name."""
        usual = BY_NAME[module].path
        return next((own for own, each in self.names.modules if each == usual), super().path(module))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return what stands before the number of a layer: in transformers, and in the checkpoint."""
        before = "layers.", self.names.layer.partition("{index}")[0]
        return tuple([f"{prefix}{each}" for prefix in self.names.prefixes for each in before])

    @cached_property
    def stored(self) -> Mapping[str, tuple[str, int]]:
        """Return the tensors of the checkpoint that have modules, and the first row of each."""
        names, [qkv] = self.names, self.names.qkv
        up, gate = names.gate_up if len(names.gate_up) == 2 else names.gate_up * 2
        places = {part: (qkv, self.dims.hidden * at) for at, part in enumerate(PARTS)}
        places |= {QKV: (qkv, 0), OUT: (names.o, 0), DOWN: (names.down, 0), UP: (up, 0), UP_GATE: (up, 0)}
        return places | {GATE: (gate, self.dims.intermediate if up == gate else 0)}


def _rope(config: HfConfig, model: ModelConfig, theta: float) -> tuple[RopeSpec, int]:
    """Return the rotation, and the longest text.

    The code of GTE scales base and frequencies whatever the length (https://kexue.fm/archives/9706).
    """
    block, dim = rope_block(config), model.dims.head_dim
    if rope_kind(block) != "ntk" or not config.architecture.startswith(GTE_CODE):
        return read_rope(config, dim, model.max_positions, theta)
    block.require("mixed_b", None)
    factor = block.positive("factor")
    base = config.number("rope_theta", theta) * factor
    return rope_spec(dim, base, LinearScaling(factor ** (2 / dim))), model.max_positions


def _read(config: HfConfig, prefix: str, names: TensorNames, theta: float, **own: Any) -> RotatedConfig:
    """Return a BERT whose positions are in rotations, under other names."""
    types, fields = config.integer("type_vocab_size", 1), dict(config.fields)
    fields |= {"type_vocab_size": types or None, "position_embedding_type": "absolute"}
    found = read_bert(HfConfig(fields, config.architecture, config.max_seq_len), prefix)
    config.require("head_dim", found.dims.head_dim)
    rope, longest = _rope(config, found, theta)
    usual = found.names
    fused = [path.rpartition(".")[2] for _, path in names.modules if path in (QKV, UP_GATE)]
    about: dict[str, Any] = {
        "dims": replace(found.dims, fused=frozenset(fused)),
        "layers": tuple([layer.changing(rope=rope) for layer in found.layers]),
        "max_positions": longest,
        "names": replace(names, prefixes=(prefix, ""), embedding=usual.embedding, final_norm=usual.final_norm),
        "token_types": types,
        "table_rows": 0,
    }
    return extend(RotatedConfig, found, about | own)


def _gated(found: RotatedConfig) -> RotatedConfig:
    """Return an encoder with gated MLPs."""
    mlp = MlpLayer(found.dims.intermediate)
    return replace(found, layers=tuple([replace(layer, mlp=mlp) for layer in found.layers]))


GTE_CODE: Final = "New"
"""Begin of the architectures of the code that came with GTE."""


def _read_gte(config: HfConfig) -> RotatedConfig:
    config.require("position_embedding_type", "rope")
    config.require("layer_norm_type", "layer_norm")
    config.require("pack_qkv", True)
    config.require("logn_attention_scale", False)
    prefix, theta, usual = "gte.", 160_000.0, {"vocab_size": 250048, "max_position_embeddings": 8192}
    if config.architecture.startswith(GTE_CODE):
        prefix, theta, usual = "new.", 10_000.0, {"vocab_size": 30528, "max_position_embeddings": 2048}
    head = VocabularyHead("lm_head.dense", "lm_head.norm", "lm_head.decoder.bias", "gelu")
    whole = HfConfig(usual | dict(config.fields), config.architecture, config.max_seq_len)
    return _gated(_read(whole, prefix, GTE_NAMES, theta, up_bias=False, vocabulary_head=head))


NOMIC_KEYS: Final = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
}
"""Keys of Nomic's own config, with those of transformers."""
NOMIC_SWITCHES: Final = {
    "activation_function": "swiglu",
    "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None,
    "num_experts": 0,
    **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "use_rms_norm"), False),
    **dict.fromkeys(("prenorm", "parallel_block", "causal", "rotary_emb_interleaved"), False),
}
"""Keys of Nomic's own config whose values are served alone."""


def _read_nomic(config: HfConfig) -> RotatedConfig:
    """Return what a Nomic BERT is; of its own config's, texts as long as those of its training."""
    fields = {"vocab_size": 30528, "max_position_embeddings": 2048, "hidden_act": "silu", **config.fields}
    fields |= {usual: fields[own] for own, usual in NOMIC_KEYS.items() if fields.get(own) is not None}
    if "n_embd" in config.fields:
        for key, value in NOMIC_SWITCHES.items():
            config.require(key, value)
        longest = config.size("max_trained_positions", 2048), fields["max_position_embeddings"]
        fields["max_position_embeddings"] = min(longest)
    fields.setdefault("type_vocab_size", 2)
    head = VocabularyHead(norm="cls.predictions.transform.layer_norm")
    bare = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False)
    own = {"embedding_norm": "emb_ln", "vocabulary_head": head, **bare}
    whole = HfConfig(fields, config.architecture, config.max_seq_len)
    return _gated(_read(whole, "nomic_bert.", NOMIC_NAMES, 1000.0, **own))


def _read_jina(config: HfConfig) -> RotatedConfig:
    usual: dict[str, Any] = {
        "vocab_size": 250002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 8194,
        "layer_norm_eps": 1e-5,
    }
    whole = HfConfig(usual | dict(config.fields), config.architecture, config.max_seq_len)
    own = {
        "embedding_norm": "emb_ln",
        "text_head": HeadLayers("classifier.out_proj", "classifier.dense"),
        "vocabulary_head": LM_HEAD,
    }
    return _read(whole, "roberta.", JINA_NAMES, 20_000.0, **own)


GTE_NAMES: Final = TensorNames(
    layer="encoder.layer.{index}.",
    qkv=("attention.qkv_proj",),
    o="attention.o_proj",
    attention_out_norm="attn_ln",
    gate_up=("mlp.up_gate_proj",),
    mlp_out_norm="mlp_ln",
    modules=(("attention.qkv_proj", QKV), ("mlp.up_gate_proj", UP_GATE), *GATED),
)
NOMIC_NAMES: Final = TensorNames(
    layer="encoder.layers.{index}.",
    qkv=("attn.Wqkv",),
    o="attn.out_proj",
    attention_out_norm="norm1",
    gate_up=("mlp.fc11", "mlp.fc12"),
    down="mlp.fc2",
    mlp_out_norm="norm2",
    modules=(("attn.Wqkv", QKV), *GATED),
)
JINA_NAMES: Final = replace(
    NOMIC_NAMES,
    qkv=("mixer.Wqkv",),
    o="mixer.out_proj",
    gate_up=("mlp.fc1",),
    modules=(("mixer.Wqkv", QKV), (OUT, OUT)),
)
GTE: Final = Family((*architectures("Gte", "gte", *TASKS), *architectures("New", "new", *TASKS)), _read_gte)
NOMIC: Final = Family(architectures("NomicBert", "nomic_bert", *TASKS), _read_nomic)
JINA: Final = Family(architectures("JinaEmbeddingsV3", "jina_embeddings_v3", *TASKS), _read_jina)
