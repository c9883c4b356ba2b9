"""A decoder over flat rows: no padding, no batch axis.

Rows of all sequences stand one after the other ([T, hidden]); attention knows from its plan which belong
together, and the adapters from theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, silu

from inference_service.kernels.attention import PagedAttention
from inference_service.layers.linear import Linear
from inference_service.layers.rope import Rope, rotate
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.config import ModelConfig
from inference_service.models.weights import Layer, Weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


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
        weights = Weights(Checkpoint(folder, dtype, device), config)
        self._embedding = weights.embedding()
        self._layers = tuple(weights.layer(index) for index in range(config.dims.num_layers))
        self._norm = weights.final_norm()
        self._head = Linear(self._embedding if config.tied_embeddings else weights.head())
        self._ropes = tuple(Rope(spec, dtype, device) for spec in config.ropes)
        self._activation = ACTIVATIONS[config.activation]
        # Rounded as the weights are: Gemma was trained with a scale in bfloat16.
        self._scale = float(torch.tensor(config.embedding_scale, dtype=dtype))

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
        turns = [rope.at(positions) for rope in self._ropes]
        hidden = embedding(tokens, self._embedding)
        if self._scale != 1.0:
            hidden = hidden * self._scale
        for index, layer in enumerate(self._layers):
            q, k, v = self._project(layer.input_norm(hidden), layer, index, turns[layer.rope], lora)
            attended = attention(q, k, v, cache.keys[index], cache.values[index], layer.attention)
            out = _linear(layer.o, attended.reshape(len(tokens), -1), lora, index, "o")
            hidden = hidden + (layer.attention_out_norm(out) if layer.attention_out_norm else out)
            gate, up = _linear(layer.gate_up, layer.mlp_norm(hidden), lora, index, "gate_up").chunk(2, dim=-1)
            out = _linear(layer.down, self._activation(gate) * up, lora, index, "down")
            hidden = hidden + (layer.mlp_out_norm(out) if layer.mlp_out_norm else out)
        logits = self._head(self._norm(hidden[last_rows]))
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _project(
        self, x: Tensor, layer: Layer, index: int, turn: tuple[Tensor, Tensor], lora: Lora | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [T, heads, d] and keys, both rotated, and values [T, kv heads, d]."""
        dims = self.config.dims
        heads = _linear(layer.qkv, x, lora, index, "qkv").view(len(x), -1, dims.head_dim)
        rotated = dims.num_heads + dims.num_kv_heads
        qk, v = heads[:, :rotated], heads[:, rotated:]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        qk = rotate(qk, *turn)
        return qk[:, : dims.num_heads], qk[:, dims.num_heads :], v


def _linear(layer: Linear, x: Tensor, lora: Lora | None, index: int, group: str) -> Tensor:
    out = layer(x)
    if lora is not None:
        lora.apply(x, out, index, group)
    return out
