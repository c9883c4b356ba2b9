"""What a decoder looks like: everything that the families differ in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loramux_shared.bases.attention import AttentionSpec, QueryGrowth
from loramux_shared.bases.groups import GroupShape, layer_groups
from loramux_shared.bases.rope import RopeSpec
from loramux_shared.bundle.modules import BaseDims


@dataclass(frozen=True)
class TensorNames:
    """Where a checkpoint keeps the tensors, without ``.weight``; a norm that is None does not exist."""

    prefixes: tuple[str, ...] = ("model.", "")
    """Of everything but the head: the first that has the last norm is taken."""
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head",)
    """Of an untied head: the first that exists is taken."""
    layer: str = "layers.{index}."
    """Before the names below."""
    input_norm: str | None = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three linears, or one that holds their rows one after the other."""
    q_norm: str | None = None
    k_norm: str | None = None
    o: str = "self_attn.o_proj"
    attention_out_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two linears, or one that holds the rows of both."""
    down: str = "mlp.down_proj"
    mlp_out_norm: str | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What layers may differ in."""

    attention: AttentionSpec
    rope: RopeSpec


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of attention and gated MLPs, with norms before or after them, or both."""

    architecture: str
    dims: BaseDims
    layers: tuple[LayerSpec, ...]
    max_positions: int
    """The longest sequence that the model was made for."""
    norm_eps: float
    dtype: str
    """Of the checkpoint: ``bfloat16``, ``float16`` or ``float32``; empty where the config does not say."""
    eos_token_ids: frozenset[int]
    tied_embeddings: bool
    names: TensorNames = TensorNames()
    norm_offset: float = 0.0
    """Added to the weights of every norm."""
    qk_norm_of_heads: bool = True
    """Whether queries and keys are normed head by head, or all heads of a row together."""
    query_growth: QueryGrowth | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Of what attention and MLP give, before it is added."""
    logit_softcap: float | None = None
    """Bound that the logits approach, by tanh."""
    logit_divisor: float = 1.0

    @property
    def groups(self) -> tuple[GroupShape, ...]:
        """The fused linears of a layer."""
        dims = self.dims
        q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        return layer_groups(dims.hidden, dims.intermediate, q, kv)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct attention windows of the layers."""
        return tuple(dict.fromkeys(layer.attention.window for layer in self.layers))

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotations of the layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))
