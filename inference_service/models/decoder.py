"""A Llama-like decoder over flat rows: no padding, no batch axis.

Rows of all sequences stand one after the other ([T, hidden]); attention knows from its plan which belong
together, and the adapters from theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from inference_service.kernels.attention import PagedAttention
from inference_service.layers.linear import Linear
from inference_service.layers.rope import Rope, inverse_frequencies, rotate
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.config import ModelConfig


class Lora(Protocol):
    """What a layer asks of the adapters."""

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out what the step's adapters make of x."""
        ...


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, each [kv heads, cache rows, head_dim]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """One layer's weights."""

    input_norm: Tensor
    qkv: Linear
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Turns token ids into logits."""

    def __init__(self, config: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Load the weights of a checkpoint.

        Raises:
            CheckpointInvalid: a tensor is missing or has another shape than config.json implies.
        """
        self.config = config
        self.dtype = dtype
        self.device = device
        dims = config.dims
        checkpoint = Checkpoint(folder, dtype, device)
        self._embedding = checkpoint.get("model.embed_tokens.weight", (dims.vocab, dims.hidden))
        self._layers = tuple(_load_layer(checkpoint, config, index) for index in range(dims.num_layers))
        self._norm = checkpoint.get("model.norm.weight", (dims.hidden,))
        tied = config.tied_embeddings or "lm_head.weight" not in checkpoint
        head = self._embedding if tied else checkpoint.get("lm_head.weight", (dims.vocab, dims.hidden))
        self._head = Linear(head)
        freqs = inverse_frequencies(dims.head_dim, config.rope_theta, config.rope_scaling)
        self._rope = Rope(freqs, config.max_positions, dtype, device)

    def new_cache(self, num_rows: int) -> KVCache:
        """Return an empty cache of num_rows tokens."""
        dims = self.config.dims
        shape = (dims.num_kv_heads, num_rows, dims.head_dim)
        tensors = [
            tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(dims.num_layers))
            for _ in range(2)
        ]
        return KVCache(*tensors)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        last_rows: Tensor,
        attention: PagedAttention,
        cache: KVCache,
        lora: Lora | None,
    ) -> Tensor:
        """Run tokens [T] at positions [T]; return the logits [len(last_rows), vocab] of those rows."""
        dims, eps = self.config.dims, self.config.norm_eps
        q_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
        cos, sin = self._rope.at(positions)
        scale = dims.head_dim**-0.5
        hidden = embedding(tokens, self._embedding)
        for index, layer in enumerate(self._layers):
            x = rms_norm(hidden, (dims.hidden,), layer.input_norm, eps)
            qkv = _linear(layer.qkv, x, lora, index, "qkv")
            q, k, v = (
                part.view(len(tokens), -1, dims.head_dim)
                for part in torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            attended = attention(q, k, v, cache.keys[index], cache.values[index], scale)
            hidden = hidden + _linear(layer.o, attended.reshape(len(tokens), q_size), lora, index, "o")
            x = rms_norm(hidden, (dims.hidden,), layer.post_norm, eps)
            gate, up = _linear(layer.gate_up, x, lora, index, "gate_up").chunk(2, dim=-1)
            hidden = hidden + _linear(layer.down, silu(gate) * up, lora, index, "down")
        last = rms_norm(hidden[last_rows], (dims.hidden,), self._norm, eps)
        return self._head(last)


def _linear(layer: Linear, x: Tensor, lora: Lora | None, index: int, group: str) -> Tensor:
    out = layer(x)
    if lora is not None:
        lora.apply(x, out, index, group)
    return out


def _load_layer(checkpoint: Checkpoint, config: ModelConfig, index: int) -> Layer:
    dims = config.dims
    prefix = f"model.layers.{index}"
    q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim

    def get(name: str, shape: tuple[int, ...]) -> Tensor:
        return checkpoint.get(f"{prefix}.{name}", shape)

    def fused(block: str, outs: dict[str, int], in_features: int, bias: bool) -> Linear:
        weights = [get(f"{block}.{name}.weight", (out, in_features)) for name, out in outs.items()]
        biases = [get(f"{block}.{name}.bias", (out,)) for name, out in outs.items()] if bias else []
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)

    return Layer(
        input_norm=get("input_layernorm.weight", (dims.hidden,)),
        qkv=fused("self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}, dims.hidden, config.attention_bias),
        o=fused("self_attn", {"o_proj": dims.hidden}, q, config.attention_bias),
        post_norm=get("post_attention_layernorm.weight", (dims.hidden,)),
        gate_up=fused(
            "mlp", {"gate_proj": dims.intermediate, "up_proj": dims.intermediate}, dims.hidden, config.mlp_bias
        ),
        down=fused("mlp", {"down_proj": dims.hidden}, dims.intermediate, config.mlp_bias),
    )
