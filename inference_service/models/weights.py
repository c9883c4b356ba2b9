"""The weights of a decoder, from where its checkpoint keeps them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference_service.kernels.attention import AttentionSpec
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.config import ModelConfig


@dataclass(frozen=True)
class Layer:
    """One layer's weights."""

    attention: AttentionSpec
    rope: int
    """Index into the decoder's ropes."""
    input_norm: RMSNorm
    qkv: Linear
    qk_norm: RMSNorm | None
    """Of the heads of queries and keys, side by side."""
    o: Linear
    attention_out_norm: RMSNorm | None
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear
    mlp_out_norm: RMSNorm | None


class Weights:
    """Reads the parts of a decoder."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self._checkpoint = checkpoint
        self._config = config
        names = config.names
        found = checkpoint.first([f"{prefix}{names.embedding}.weight" for prefix in names.prefixes])
        self._prefix = found.removesuffix(f"{names.embedding}.weight")

    def embedding(self) -> Tensor:
        """[vocab, hidden]"""
        dims = self._config.dims
        return self._get(f"{self._config.names.embedding}.weight", (dims.vocab, dims.hidden))

    def head(self) -> Tensor:
        """[vocab, hidden], of an untied head."""
        dims = self._config.dims
        name = self._checkpoint.first([f"{name}.weight" for name in self._config.names.heads])
        return self._checkpoint.get(name, (dims.vocab, dims.hidden))

    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
        return self._norm(self._config.names.final_norm)

    def layer(self, index: int) -> Layer:
        """One layer."""
        config, names, dims = self._config, self._config.names, self._config.dims
        at = names.layer.format(index=index)
        spec = config.layers[index]
        q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        return Layer(
            attention=spec.attention,
            rope=config.ropes.index(spec.rope),
            input_norm=self._norm(at + names.input_norm),
            qkv=self._fused(at, names.qkv, (q, kv, kv), dims.hidden, config.qkv_bias),
            qk_norm=self._qk_norm(at),
            o=self._fused(at, (names.o,), (dims.hidden,), q, config.o_bias),
            attention_out_norm=self._optional_norm(at, names.attention_out_norm),
            mlp_norm=self._norm(at + names.mlp_norm),
            gate_up=self._fused(at, names.gate_up, (dims.intermediate,) * 2, dims.hidden, config.mlp_bias),
            down=self._fused(at, (names.down,), (dims.hidden,), dims.intermediate, config.mlp_bias),
            mlp_out_norm=self._optional_norm(at, names.mlp_out_norm),
        )

    def _fused(
        self, at: str, names: tuple[str, ...], outs: tuple[int, ...], in_features: int, bias: bool
    ) -> Linear:
        """The rows of several linears as one, as which the checkpoint may have them already."""
        sizes = outs if len(names) == len(outs) else (sum(outs),)
        parts = list(zip(names, sizes, strict=True))
        weight = _cat([self._get(f"{at}{name}.weight", (out, in_features)) for name, out in parts])
        if not bias:
            return Linear(weight)
        return Linear(weight, _cat([self._get(f"{at}{name}.bias", (out,)) for name, out in parts]))

    def _qk_norm(self, at: str) -> RMSNorm | None:
        names, dims = self._config.names, self._config.dims
        if names.q_norm is None or names.k_norm is None:
            return None
        q, k = (self._get(f"{at}{name}.weight", (dims.head_dim,)) for name in (names.q_norm, names.k_norm))
        weight = torch.cat([q.expand(dims.num_heads, -1), k.expand(dims.num_kv_heads, -1)])
        return RMSNorm(weight, self._config.norm_eps, self._config.norm_offset)

    def _optional_norm(self, at: str, name: str | None) -> RMSNorm | None:
        return None if name is None else self._norm(at + name)

    def _norm(self, name: str) -> RMSNorm:
        weight = self._get(f"{name}.weight", (self._config.dims.hidden,))
        return RMSNorm(weight, self._config.norm_eps, self._config.norm_offset)

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._checkpoint.get(self._prefix + name, shape)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
