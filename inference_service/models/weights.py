"""The weights of a decoder, from where its checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.lora.weights import AdapterWeights, GroupWeights
from inference_service.models.checkpoint import Tensors
from loramux_shared.bases.attention import AttentionSpec
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.groups import GroupShape


@dataclass(frozen=True)
class Layer:
    """One layer's weights."""

    attention: AttentionSpec
    rope: int
    """Index into the decoder's ropes."""
    input_norm: RMSNorm | None
    qkv: Linear
    row_norms: tuple[RMSNorm, RMSNorm] | None
    """Of queries and of keys, where they are normed all heads together."""
    qk_norm: RMSNorm | None
    """Of the heads of queries and keys, side by side."""
    o: Linear
    attention_out_norm: RMSNorm | None
    mlp_norm: RMSNorm | None
    gate_up: Linear
    down: Linear
    mlp_out_norm: RMSNorm | None


class Weights:
    """Reads the parts of a decoder."""

    def __init__(
        self,
        checkpoint: Tensors,
        config: ModelConfig,
        dtype: torch.dtype,
        new_linear: Callable[[Tensor, Tensor | None], Linear],
        merged: AdapterWeights | None = None,
    ) -> None:
        """Read from a checkpoint, which may be in a wider type than dtype; merged is added to the linears.

        The sum is made in the checkpoint's type, and rounded once.
        """
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._new_linear = new_linear
        self._merged = merged
        names = config.names
        found = checkpoint.first([f"{prefix}{names.final_norm}.weight" for prefix in names.prefixes])
        self._prefix = found.removesuffix(f"{names.final_norm}.weight")

    def tables(self) -> tuple[Tensor, Tensor]:
        """Embeddings and head, both [vocab, hidden]; of a tied model they are one tensor.

        As in transformers, a checkpoint counts before its config: what is tied may stand under either name, and
        where it stands under both with different values it is not tied.
        """
        config, checkpoint = self._config, self._checkpoint
        embedding = f"{self._prefix}{config.names.embedding}.weight"
        head = checkpoint.first([f"{name}.weight" for name in config.names.heads])
        if config.tied_embeddings and not (checkpoint.has(embedding) and checkpoint.has(head)):
            only = self._table(head if checkpoint.has(head) else embedding)
            return only, only
        first, last = self._table(embedding), self._table(head)
        return first, first if config.tied_embeddings and torch.equal(first, last) else last

    def _table(self, name: str) -> Tensor:
        dims = self._config.dims
        return self._checkpoint.get(name, (dims.vocab, dims.hidden)).to(self._dtype)

    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
        return self._norm(self._config.names.final_norm)

    def layer(self, index: int) -> Layer:
        """One layer."""
        config, names = self._config, self._config.names
        at = names.layer.format(index=index)
        spec = config.layers[index]
        qkv, o, gate_up, down = config.groups
        merged = self._merged.layers[index] if self._merged else {}

        def fused(shape: GroupShape, parts: tuple[str, ...], bias: bool) -> Linear:
            return self._fused(at, parts, shape, bias, merged.get(shape.name))

        return Layer(
            attention=spec.attention,
            rope=config.ropes.index(spec.rope),
            input_norm=self._optional_norm(at, names.input_norm),
            qkv=fused(qkv, names.qkv, config.qkv_bias),
            row_norms=self._row_norms(at),
            qk_norm=self._qk_norm(at),
            o=fused(o, (names.o,), config.o_bias),
            attention_out_norm=self._optional_norm(at, names.attention_out_norm),
            mlp_norm=self._optional_norm(at, names.mlp_norm),
            gate_up=fused(gate_up, names.gate_up, config.mlp_bias),
            down=fused(down, (names.down,), config.mlp_bias),
            mlp_out_norm=self._optional_norm(at, names.mlp_out_norm),
        )

    def _fused(
        self, at: str, names: tuple[str, ...], shape: GroupShape, bias: bool, merged: GroupWeights | None
    ) -> Linear:
        """The rows of several linears as one, as which the checkpoint may have them already."""
        outs = shape.out_features
        sizes = outs if len(names) == len(outs) else (sum(outs),)
        parts = list(zip(names, sizes, strict=True))
        weight = _cat([self._get(f"{at}{name}.weight", (out, shape.in_features)) for name, out in parts])
        if merged is not None:
            weight = _merge(weight, merged, shape)
        biases = [self._get(f"{at}{name}.bias", (out,)) for name, out in parts] if bias else []
        return self._new_linear(weight.to(self._dtype), _cat(biases).to(self._dtype) if biases else None)

    def _qk_norm(self, at: str) -> RMSNorm | None:
        names, dims = self._config.names, self._config.dims
        if names.q_norm is None or names.k_norm is None or not self._config.qk_norm_of_heads:
            return None
        q, k = (self._get(f"{at}{name}.weight", (dims.head_dim,)) for name in (names.q_norm, names.k_norm))
        weight = torch.cat([q.expand(dims.num_heads, -1), k.expand(dims.num_kv_heads, -1)])
        return RMSNorm(weight.to(self._dtype), self._config.norm_eps, self._config.norm_offset)

    def _row_norms(self, at: str) -> tuple[RMSNorm, RMSNorm] | None:
        names, dims = self._config.names, self._config.dims
        if names.q_norm is None or names.k_norm is None or self._config.qk_norm_of_heads:
            return None
        q = self._norm(at + names.q_norm, dims.num_heads * dims.head_dim)
        return q, self._norm(at + names.k_norm, dims.num_kv_heads * dims.head_dim)

    def _optional_norm(self, at: str, name: str | None) -> RMSNorm | None:
        return None if name is None else self._norm(at + name)

    def _norm(self, name: str, width: int | None = None) -> RMSNorm:
        weight = self._get(f"{name}.weight", (width or self._config.dims.hidden,))
        return RMSNorm(weight.to(self._dtype), self._config.norm_eps, self._config.norm_offset)

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._checkpoint.get(self._prefix + name, shape)


def _merge(weight: Tensor, adapter: GroupWeights, shape: GroupShape) -> Tensor:
    """Return weight [out, in] with the products of the adapter's slices added."""
    merged = weight.clone()
    for a, b, offset, size in zip(adapter.a, adapter.b, shape.out_offsets, shape.out_features, strict=True):
        if a is not None and b is not None:
            merged[offset : offset + size].addmm_(b.t().to(weight), a.to(weight))
    return merged


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
