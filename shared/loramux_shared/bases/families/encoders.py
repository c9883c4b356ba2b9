"""The families of encoders: BERT, RoBERTa, XLM-RoBERTa and ModernBERT, described by their ``config.json``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Final, Literal, TypeVar

from loramux_shared.bases.config import ModelConfig, TensorNames
from loramux_shared.bases.family import Architecture, Family, labels_of, layer_types, llama_like, plain_mlps
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.rope import RopeSpec, Still, read_rope_of
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.modules import FUSED, Renamed
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import Pooling

POOLER: Final = "pooler.dense"
"""BERT's layer behind the state of the first token, which its score heads read."""
SIZES: Final = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
"""Sizes of transformers' classes, where a config leaves them out."""
ACTIVATIONS: Final = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclass(frozen=True)
class HeadLayers:
    """The modules of a score head."""

    labels: str = "classifier"
    """Name of the layer that gives the scores; empty where the head is not served."""
    dense: str = ""
    """Name of the layer before it; empty where there is none."""
    norm: str = ""
    """Name of the norm between both layers; empty where there is none."""
    without_bias: tuple[str, ...] = ()
    """Those of these modules that have no bias."""
    pooling: Literal[Pooling.MEAN, Pooling.ALL] | None = None
    """The states that it reads where it is not the first one alone."""
    activation: Literal["relu", "gelu"] | None = None
    """Activation behind the dense layer; None: tanh, or gelu where there is a norm."""

    @property
    def biased(self) -> tuple[str, ...]:
        """Return the names of the modules that have a bias, in the order of computation."""
        names = self.dense, self.norm, self.labels
        return tuple(name for name in names if name and name not in self.without_bias)

    def score_head(self, labels: int, config: ModelConfig) -> ScoreHead:
        """Return what a bundle says of a head of so many labels."""
        eps = config.norm_eps if self.norm else None
        kind: dict[str, Any] = {"norm_eps": eps, "activation": self.activation, "pooling": self.pooling}
        return ScoreHead(num_labels=labels, hidden_size=config.dims.hidden, dense=bool(self.dense), **kind)


@dataclass(frozen=True)
class VocabularyHead:
    """The modules of the head of masked language modelling, whose last layer has the rows of the embeddings."""

    dense: str = "cls.predictions.transform.dense"
    norm: str = "cls.predictions.transform.LayerNorm"
    bias: str = "cls.predictions.bias"
    """The whole name of the bias of the last layer."""
    activation: str | None = None
    """Activation behind the dense layer; None: that of the MLPs."""
    without_bias: tuple[str, ...] = ()
    """Those of these modules that have no bias."""


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """An encoder: layers as BERT has them, with norms behind attention and MLP."""

    encodes: ClassVar[bool] = True

    table_rows: int = 0
    """Rows of the table of positions."""
    padding: int | None = None
    """The token that has no position of its own, by which positions begin, as RoBERTa has it; None: at 0."""
    hidden_act: str = "gelu"
    """Activation between the linears of the MLP."""
    up_bias: bool = True
    """False if the first one has no bias where the second one has."""
    embedding_norm: str = "embeddings.LayerNorm"
    """Name of the norm of the sum of all embeddings."""
    text_head: HeadLayers = HeadLayers(dense=POOLER)
    """The score head of sequence classification."""
    token_head: HeadLayers = HeadLayers(pooling=Pooling.ALL)
    """The score head of token classification."""
    vocabulary_head: VocabularyHead | None = VocabularyHead()
    """The head of masked language modelling; None where it is not served."""
    sparse_logs: int = 0
    """How often log(1 + x) is taken of that head's scores for a sparse vector; 0: it makes none."""
    scores_tokens: bool = False
    """True if the base's own head is one of token classification."""

    def head(self, *, of_tokens: bool) -> HeadLayers:
        """Return the score head of token classification, or of sequence classification."""
        return self.token_head if of_tokens else self.text_head


@dataclass(frozen=True)
class ModernConfig(EncoderConfig):
    """An encoder as ModernBERT is: rotated heads, gated MLPs, and norms before attention and MLP."""

    reaches: tuple[int | None, ...] = ()
    """For each layer, the positions to each side that a row sees; None: all."""

    @cached_property
    def renamed(self) -> frozenset[Renamed]:
        """Modules of layers under its own names, also those that are several in one."""
        names = self.names
        own = names.qkv[0], names.o, names.gate_up[0], names.down
        usual = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
        return frozenset(zip(own, usual, strict=True))


def _names(prefix: str) -> TensorNames:
    return TensorNames(
        prefixes=(prefix, ""),
        embedding="embeddings.word_embeddings",
        final_norm="embeddings.word_embeddings",  # no norm is last; the prefix of this one is everybody's
        layer="encoder.layer.{index}.",
        qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
        o="attention.output.dense",
        attention_out_norm="attention.output.LayerNorm",
        gate_up=("intermediate.dense",),
        down="output.dense",
        mlp_out_norm="output.LayerNorm",
    )


def read_bert(config: HfConfig, prefix: str, sizes: Mapping[str, int] = SIZES) -> EncoderConfig:
    """Return what a BERT is."""
    config.require("is_decoder", False)
    config.require("add_cross_attention", False)
    config.require("position_embedding_type", "absolute")
    config.require("pruned_heads", {})
    config.require("hidden_act", *ACTIVATIONS)
    model = _bidirectional(config, sizes)
    rows = config.size("max_position_embeddings", 512)
    own = {
        "layers": plain_mlps(model),
        "max_positions": rows,
        "norm_eps": config.number("layer_norm_eps", 1e-12),
        "dtype": model.dtype or "float32",
        "names": _names(prefix),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "token_types": config.size("type_vocab_size", 2),
    }
    own |= {"table_rows": rows, "hidden_act": config.text("hidden_act", "gelu")}
    return extend(EncoderConfig, model, own | _own_head(config))


Kind = TypeVar("Kind", bound=EncoderConfig)


def extend(kind: type[Kind], model: ModelConfig, own: Mapping[str, Any]) -> Kind:
    """Return a model as a kind of encoder, with values of its own."""
    return kind(**{each.name: getattr(model, each.name) for each in fields(model)} | dict(own))


def _own_head(config: HfConfig) -> dict[str, Any]:
    """Return what is known of the base's own score head."""
    of_tokens = config.architecture.endswith(TOKENS)
    return {
        "labels": labels_of(config) if of_tokens or config.architecture.endswith(SCORES) else (),
        "problem_type": config.text("problem_type", "") or None,
        "scores_tokens": of_tokens,
    }


def _bidirectional(config: HfConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """Return layers in which every row sees all others, with gated MLPs, and rotations that turn nothing."""
    ignored = {"num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters"}
    kept = {key: value for key, value in config.fields.items() if key not in ignored}
    model = llama_like(HfConfig(kept, config.architecture), sizes=sizes, tied=True, rope=_still)
    if model.dims.hidden % model.dims.num_heads:
        raise CheckpointInvalid(
            f"config.json: num_attention_heads: expected a divisor of hidden_size {model.dims.hidden}, found "
            f"{model.dims.num_heads}."
        )
    mixer = replace(model.attentions[0], bidirectional=True)
    return replace(model, layers=tuple(replace(layer, mixer=mixer) for layer in model.layers))


def _still(_config: HfConfig, head_dim: int, max_positions: int) -> tuple[RopeSpec, int]:
    """Return a rotation that turns nothing: positions are in the embeddings."""
    return RopeSpec(head_dim, 10000.0, Still()), max_positions


def _read_roberta(config: HfConfig, sizes: Mapping[str, int] = SIZES) -> EncoderConfig:
    """Return what a RoBERTa is: positions begin behind the padding's, and a head has its own dense layer."""
    found = read_bert(config, "roberta.", sizes)
    padding = config.integer("pad_token_id", 1)
    return replace(
        found,
        max_positions=found.table_rows - padding - 1,
        padding=padding,
        text_head=HeadLayers("classifier.out_proj", "classifier.dense"),
        vocabulary_head=LM_HEAD,
    )


LM_HEAD: Final = VocabularyHead("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "gelu")
"""The head of masked language modelling of RoBERTa and others."""


SCORES: Final = "ForSequenceClassification"
TOKENS: Final = "ForTokenClassification"
"""Ends of the names of architectures with a score head."""


def architectures(name: str, model_type: str, *tasks: str) -> tuple[Architecture, ...]:
    """Return the model of a name, and those for tasks."""
    return tuple(Architecture(f"{name}{task}", model_type) for task in ("Model", *tasks))


TASKS: Final = ("ForMaskedLM", SCORES, TOKENS)
BERT: Final = Family(
    architectures("Bert", "bert", *TASKS, "ForPreTraining"), partial(read_bert, prefix="bert.")
)
ROBERTA: Final = Family(
    architectures("Roberta", "roberta", *TASKS), partial(_read_roberta, sizes=SIZES | {"vocab_size": 50265})
)
XLM_ROBERTA: Final = Family(architectures("XLMRoberta", "xlm-roberta", *TASKS), _read_roberta)

MODERN_NAMES: Final = TensorNames(
    embedding="embeddings.tok_embeddings",
    final_norm="final_norm",
    input_norm="attn_norm",
    qkv=("attn.Wqkv",),
    o="attn.Wo",
    mlp_norm="mlp_norm",
    gate_up=("mlp.Wi",),
    down="mlp.Wo",
)
MODERN_SIZES: Final = SIZES | {"vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152}
THETAS: Final = {
    "full_attention": ("global_rope_theta", 160_000.0),
    "sliding_attention": ("local_rope_theta", 10_000.0),
}
"""For each type of layer, its key beside the blocks, and the default."""


def _read_modern(config: HfConfig) -> ModernConfig:
    """Return what a ModernBERT is."""
    config.require("hidden_activation", "gelu")
    config = _spread_scaling(config)
    every = config.size("global_attn_every_n_layers", 3)
    model = _bidirectional(config, MODERN_SIZES)
    dims, rows = model.dims, config.size("max_position_embeddings", 8192)
    types = layer_types(config, dims.num_layers, lambda index: index % every != 0)
    ropes = {
        kind: read_rope_of(config, kind, dims.head_dim, rows, config.number(*THETAS[kind]))
        for kind in dict.fromkeys(types)
    }
    bias, norm_bias = (config.flag(name, default=False) for name in ("attention_bias", "norm_bias"))
    own = {
        "dims": replace(dims, fused=frozenset(FUSED)),
        "layers": tuple(
            layer.changing(rope=ropes[kind]) for layer, kind in zip(model.layers, types, strict=True)
        ),
        "max_positions": rows,
        "norm_eps": config.number("norm_eps", 1e-5),
        "layer_norm": True,
        "norm_bias": norm_bias,
        "dtype": model.dtype or "float32",
        "names": MODERN_NAMES,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": config.flag("mlp_bias", default=False),
        "activation": "gelu",
    }
    side = config.size("local_attention", 128) // 2
    own["reaches"] = tuple([side if kind == "sliding_attention" else None for kind in types])
    return extend(ModernConfig, model, own | _modern_heads(config, norm_bias=norm_bias) | _own_head(config))


def _spread_scaling(config: HfConfig) -> HfConfig:
    """Return a config with ``rope_scaling`` in the blocks of all types of layers, as transformers takes it."""
    scaling, blocks = config.block("rope_scaling").fields, config.block("rope_parameters")
    if not scaling:
        return config
    scaled = {kind: {"rope_type": "default", **blocks.block(kind).fields, **scaling} for kind in THETAS}
    own = {**config.fields, "rope_parameters": {**blocks.fields, **scaled}}
    return HfConfig(own, config.architecture, config.max_seq_len)


def _modern_heads(config: HfConfig, *, norm_bias: bool) -> dict[str, Any]:
    """Return both score heads; they have no layers where their activation or pooling is not served."""
    biases = {"head.dense": config.flag("classifier_bias", default=False), "head.norm": norm_bias}
    pooling, activation = config.text("classifier_pooling", "cls"), config.text("classifier_activation", "gelu")
    if config.architecture.endswith((SCORES, TOKENS)):
        config.require("classifier_activation", "gelu")
        config.require("classifier_pooling", "cls", "mean")
    if activation != "gelu" or pooling not in ("cls", "mean"):
        return dict.fromkeys(("text_head", "token_head"), HeadLayers("")) | {"vocabulary_head": None}
    bare = tuple(name for name, biased in biases.items() if not biased)
    head = HeadLayers("classifier", "head.dense", "head.norm", bare, Pooling.ALL)
    predicts = VocabularyHead("head.dense", "head.norm", "decoder.bias", "gelu", bare)
    return {
        "text_head": replace(head, pooling=Pooling.MEAN if pooling == "mean" else None),
        "token_head": head,
        "vocabulary_head": predicts if config.flag("decoder_bias", default=True) else None,
    }


MODERN_BERT: Final = Family(architectures("ModernBert", "modernbert", *TASKS), _read_modern)
