"""The description of a decoder: everything that the families differ in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from loramux_shared.bases.groups import GroupShape, distinct, features_of, named_apart
from loramux_shared.bases.layers import (
    AttentionLayer,
    CannotShard,
    ExpertsLayer,
    InputLayer,
    LayerSpec,
    MlpLayer,
)
from loramux_shared.bases.rope import HeadCounts, QueryScaling, RopeSpec
from loramux_shared.bases.weight_format import Quantization
from loramux_shared.bundle.modules import BY_NAME, NO_LAYER, BaseDims, Renamed
from loramux_shared.faults import SettingsInvalid


@dataclass(frozen=True)
class InputNames:
    """Names of the tensors of the checkpoint that give a token's own input to each layer."""

    table: str = "embed_tokens_per_layer"
    projection: str = "per_layer_model_projection"
    norm: str = "per_layer_projection_norm"
    gate: str = "per_layer_input_gate"
    """This and the following are a layer's."""
    layer_projection: str = "per_layer_projection"
    out_norm: str = "post_per_layer_input_norm"


@dataclass(frozen=True)
class DeltaNames:
    """The names of a gated delta rule; the whole name where a tensor is neither linear nor norm."""

    inputs: tuple[str, ...] = tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a"))
    conv: str = "linear_attn.conv1d.weight"
    decay: str = "linear_attn.A_log"
    """The logarithm of how fast a state decays."""
    dt_bias: str = "linear_attn.dt_bias"
    norm: str = "linear_attn.norm"
    out: str = "linear_attn.out_proj"


@dataclass(frozen=True)
class BesideNames:
    """Names of the tensors of a mixture of experts beside its MLP."""

    mlp_out_norm: str = "post_feedforward_layernorm_1"
    experts_norm: str = "pre_feedforward_layernorm_2"
    experts_out_norm: str = "post_feedforward_layernorm_2"
    router_scale: str = "router.scale"
    """The whole name of [hidden], as the next one of [experts]."""
    expert_scale: str = "router.per_expert_scale"


@dataclass(frozen=True)
class TensorNames:
    """Names of the tensors of a checkpoint, without ``.weight``; a norm that is None does not exist."""

    prefixes: tuple[str, ...] = ("model.", "")
    """Prefixes of everything but the head; the first one that has the last norm is used."""
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head",)
    """Names of an untied head; the first that exists is used."""
    layer: str = "layers.{index}."
    """Before the names below."""
    input_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three linears, or one that holds their rows one after the other."""
    q_norm: str | None = None
    k_norm: str | None = None
    sinks: str | None = None
    """The whole name of [query heads]: scores of what every row sees besides, and which has no value."""
    o: str = "self_attn.o_proj"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two linears, or one that holds the rows of both."""
    down: str = "mlp.down_proj"
    delta: DeltaNames = DeltaNames()
    mlp_out_norm: str | None = None
    router: str = "mlp.gate"
    """Name of the router of a mixture of experts."""
    experts: str = "mlp.experts"
    """Before the number of an expert and its linears, or before the tensors of all experts."""
    of_all_experts: tuple[str, str] = ("gate_up_proj", "down_proj")
    """The whole names of the tensors of all experts together: of gate and up in one, and of down."""
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The linears of an expert: gate, up and down."""
    shared_expert: str = "mlp.shared_expert"
    """The one that all rows have; the name of its gate ends in ``_gate``."""
    beside: BesideNames = BesideNames()
    scalar: str | None = None
    """The whole name of [1]: what hidden rows are multiplied with behind a layer."""
    inputs: InputNames = InputNames()
    modules: tuple[Renamed, ...] = ()
    """Modules of layers with other names than most bases', beside those that follow from the names above."""


@dataclass(frozen=True)
class LogitScore:
    """The score of a pair of texts: the logit of a token, less that of another one where there is one."""

    true_token: int
    false_token: int | None = None
    instruction: str = ""
    """Message of the system before query and document; empty for none."""
    raw: bool = False
    """True where a score is no probability's logit: nothing is computed from it."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of attention and gated MLPs or mixtures, with norms before or after them, or both."""

    architecture: str
    dims: BaseDims
    layers: tuple[LayerSpec, ...]
    max_positions: int
    """The longest sequence that the model was made for."""
    norm_eps: float
    dtype: str
    """Type of the checkpoint: ``bfloat16``, ``float16`` or ``float32``; empty where the config has none."""
    eos_token_ids: frozenset[int]
    tied_embeddings: bool
    names: TensorNames = TensorNames()
    norm_offset: float = 0.0
    """Added to the weights of every norm."""
    layer_norm: bool = False
    """True if norms subtract the mean of a row first."""
    norm_bias: bool = False
    """True if such norms have biases."""
    qk_norm_of_heads: bool = True
    """True if queries and keys are normed head by head; False if all heads of a row are normed together."""
    query_scaling: QueryScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    parallel: bool = False
    """True if attention and MLP of a layer read the same hidden rows, and are added together."""
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor of the outputs of attention and MLP, before they are added."""
    logit_softcap: float | None = None
    """Bound that the logits approach, by tanh."""
    logit_divisor: float = 1.0
    quantization: Quantization | None = None
    """Storage format of the linears; None: the type in which they are served."""
    has_head: bool = True
    """False for a decoder without the head of its vocabulary, which makes vectors and scores alone."""
    for_vectors: bool = False
    """True for one that was trained to make vectors, and may lack that head."""
    labels: tuple[str, ...] = ()
    """Names of the labels of the base's own score head; none where it has no such head."""
    problem_type: str | None = None
    """Kind of its scores, as transformers names it."""
    logit_score: LogitScore | None = None
    """Scores of documents that a decoder makes by its own logits."""
    token_types: int = 0
    """Rows of an encoder's table of token types; 0: it has none, and no type changes an answer."""

    encodes: ClassVar[bool] = False
    """True of an encoder, which makes vectors alone, of sequences that a step computes whole."""

    @property
    def generates(self) -> bool:
        """Return True for a base that generates text."""
        return self.has_head and not self.encodes

    @cached_property
    def layer_groups(self) -> tuple[tuple[GroupShape, ...], ...]:
        """The fused linears of each layer; those that differ have different names."""
        return named_apart(layer.groups(self.dims.hidden) for layer in self.layers)

    @cached_property
    def groups(self) -> tuple[GroupShape, ...]:
        """The distinct fused linears of all layers."""
        return distinct(self.layer_groups)

    @cached_property
    def attentions(self) -> tuple[AttentionLayer, ...]:
        """The mixers of the layers that attend."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, AttentionLayer))

    @cached_property
    def heads(self) -> tuple[HeadCounts, ...]:
        """The distinct heads of the layers."""
        return tuple(dict.fromkeys(mixer.heads for mixer in self.attentions))

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the layers."""
        return tuple(dict.fromkeys(mixer.attention.window for mixer in self.attentions))

    @cached_property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotations of the layers."""
        return tuple(dict.fromkeys(mixer.rope for mixer in self.attentions))

    @cached_property
    def renamed(self) -> frozenset[Renamed]:
        """Modules of layers that the base has under other names than most bases."""
        own = {"attn_dense": self.names.o, "mlp_4h_to_h": self.names.down}
        if len(self.names.qkv) == 3:
            own |= zip(("attn_q", "attn_k", "attn_v"), self.names.qkv, strict=True)
        plain = any(isinstance(layer.mlp, MlpLayer) and not layer.mlp.gated for layer in self.layers)
        if plain or len(self.names.gate_up) == 2:
            own |= zip(("mlp_h_to_4h", "mlp_gate"), self.names.gate_up, strict=False)
        for module in ("shared_h_to_4h", "shared_4h_to_h", "shared_gate"):
            own[module] = f"{self.names.shared_expert}.{BY_NAME[module].hf}"
        usual = {module: BY_NAME[module].path for module in own}
        pairs = ((name, usual[module]) for module, name in own.items() if name != usual[module])
        return frozenset((*pairs, *self.names.modules))

    def path(self, module: str) -> str:
        """Return a module's name within a layer of the base, by its bundle name."""
        usual = BY_NAME[module].path
        return next((own for own, each in self.renamed if each == usual), usual)

    def state_bytes(self, item_bytes: int) -> int:
        """Return what layers carry from token to token for a sequence; 0 where none does."""
        return sum(layer.mixer.state_bytes(item_bytes) for layer in self.layers)

    @property
    def stored(self) -> Mapping[str, tuple[str, int]]:
        """Return the tensor of a layer that has a module, and its first row there, by the path in `MODULES`.

        Only where the checkpoint names modules otherwise than adapters do.
        """
        return {}

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return what stands before the number of a layer, where layers are not called as in most bases."""
        before = self.names.layer.partition("{index}")[0]
        usual = before == "layers." and self.names.prefixes[0].endswith("model.")
        return () if usual else tuple([f"{prefix}{before}" for prefix in self.names.prefixes])

    @property
    def inputs(self) -> InputLayer | None:
        """Return the layers' input from tokens; all layers have the same one or none."""
        return self.layers[0].inputs

    def features(self, module: str, layer: int) -> tuple[int, int] | None:
        """Return (in, out) of a module, by its bundle name, in a layer; None where there is no such module.

        Embeddings and head are in `NO_LAYER`; an embedding's input is a token.
        """
        if layer == NO_LAYER:
            vocab, hidden = self.dims.vocab, self.dims.hidden
            return {"embedding": (vocab, hidden), "head": (hidden, vocab)}.get(module)
        return self._features[layer].get(module) if 0 <= layer < len(self.layers) else None

    def shard(self, world: int) -> ModelConfig:
        """Return the decoder that one of several ranks computes: some heads of each layer, and some columns.
        Raise SettingsInvalid, with the part, for what cannot be divided.
        """
        try:
            layers = {layer: layer.shard(world) for layer in dict.fromkeys(self.layers)}
            config = replace(self, layers=tuple([layers[layer] for layer in self.layers]))
            config._require_names_of(self)
        except CannotShard as error:
            raise SettingsInvalid(
                f"LORAMUX_TENSOR_PARALLEL={world} (or build.tensor_parallel_count of the deployment): the base "
                f"has {error}. Set another number, or 1 and more replicas."
            ) from error
        return config

    def _require_names_of(self, whole: ModelConfig) -> None:
        for groups in zip(self.layer_groups, whole.layer_groups, strict=True):
            own, others = ([group.name for group in some] for some in groups)
            if own != others:
                raise CannotShard("layers that differ in their heads of keys alone")

    @property
    def has_experts(self) -> bool:
        """Return True if a layer is a mixture of experts."""
        return any(isinstance(layer.mlp, ExpertsLayer) for layer in self.layers)

    @cached_property
    def _features(self) -> tuple[dict[str, tuple[int, int]], ...]:
        tables = {groups: features_of(groups) for groups in dict.fromkeys(self.layer_groups)}
        return tuple(tables[groups] for groups in self.layer_groups)
