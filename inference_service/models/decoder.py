"""A decoder over flat rows: no padding, no batch axis.

Rows of all sequences stand one after the other ([T, hidden]); attention knows from its plan which belong
together, and the adapters from theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, silu

from inference_service.kernels.attention import Context, PagedAttention
from inference_service.kernels.cpu.ops import CpuOps
from inference_service.layers.attention import Attention, NativeAttention, TorchAttention
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import Rope
from inference_service.lora.backend import LoraBackend
from inference_service.lora.weights import AdapterWeights
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.config import ModelConfig
from inference_service.models.weights import Weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers; the layout within a layer is the attention's."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Decoder:
    """Turns token ids into logits."""

    def __init__(
        self,
        config: ModelConfig,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        ops: CpuOps | None = None,
    ) -> None:
        """Load the weights of a checkpoint; ops are the compiled operations to run it with, if any.

        Raises:
            CheckpointInvalid: a tensor is missing or has another shape than config.json implies.
        """
        self.config = config
        self.dtype = dtype
        self.device = device
        self._ops = ops
        weights = Weights(Checkpoint(folder, dtype, device), config, dtype, ops)
        self._embedding = weights.embedding()
        self._layers = tuple(weights.layer(index) for index in range(config.dims.num_layers))
        self._norm = weights.final_norm()
        self._head = Linear(self._embedding if config.tied_embeddings else weights.head())
        self._ropes = tuple(Rope(spec, dtype, device) for spec in config.ropes)
        # Rounded as the weights are: Gemma was trained with a scale in bfloat16.
        self._scale = float(torch.tensor(config.embedding_scale, dtype=dtype))

    def merge(self, folder: Path, adapter: AdapterWeights) -> None:
        """Add an adapter to the weights for good; folder is the checkpoint that they came from.

        W + BA is summed in float32 and rounded once.
        """
        checkpoint = Checkpoint(folder, torch.float32, self.device)
        weights = Weights(checkpoint, self.config, self.dtype, self._ops, adapter)
        self._layers = tuple(weights.layer(index) for index in range(self.config.dims.num_layers))

    def new_cache(self, num_rows: int) -> KVCache:
        """Return an empty cache of num_rows tokens, a multiple of the block size."""
        dims = self.config.dims
        pairs = [self._layer_cache(dims.num_kv_heads, num_rows, dims.head_dim) for _ in self._layers]
        return KVCache(tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs))

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Plan the attention of a step."""
        heads, kv_heads = self.config.dims.num_heads, self.config.dims.num_kv_heads
        if self._ops is not None:
            return NativeAttention(self._ops, contexts, block_size, heads, kv_heads)
        plan = PagedAttention(
            contexts, block_size, heads // kv_heads, self.dtype, self.device, self.config.windows
        )
        return TorchAttention(plan, heads, kv_heads)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        last_rows: Tensor,
        attention: Attention,
        cache: KVCache,
        lora: LoraBackend | None,
    ) -> Tensor:
        """Run tokens [T] at positions [T]; return the logits [len(last_rows), vocab] of those rows."""
        turns = [attention.turn(*rope.at(positions)) for rope in self._ropes]
        hidden = embedding(tokens, self._embedding)
        if self._scale != 1.0:
            hidden = hidden * self._scale
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            hidden, x = layer.input_norm.add(hidden, delta)
            heads = _linear(layer.qkv, x, lora, index, "qkv").view(len(x), -1, self.config.dims.head_dim)
            if layer.qk_norm is not None:
                heads = self._norm_heads(heads, layer.qk_norm)
            attended = attention(
                heads, turns[layer.rope], cache.keys[index], cache.values[index], layer.attention
            )
            delta = _linear(layer.o, attended, lora, index, "o")
            if layer.attention_out_norm is not None:
                delta = layer.attention_out_norm(delta)
            hidden, x = layer.mlp_norm.add(hidden, delta)
            gated = self._activate(_linear(layer.gate_up, x, lora, index, "gate_up"))
            delta = _linear(layer.down, gated, lora, index, "down")
            if layer.mlp_out_norm is not None:
                delta = layer.mlp_out_norm(delta)
        last = hidden[last_rows] if delta is None else hidden[last_rows] + delta[last_rows]
        logits = self._head(self._norm(last))
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _norm_heads(self, heads: Tensor, norm: RMSNorm) -> Tensor:
        """Norm the heads of queries and keys [T, all heads, d], not those of values."""
        rotated = self.config.dims.num_heads + self.config.dims.num_kv_heads
        return torch.cat([norm(heads[:, :rotated]), heads[:, rotated:]], dim=1)

    def _activate(self, gate_up: Tensor) -> Tensor:
        """Return activation(gate) * up [T, intermediate] of both side by side."""
        if self._ops is not None and self.config.activation == "silu":
            return self._ops.silu_mul(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[self.config.activation](gate) * up

    def _layer_cache(self, kv_heads: int, num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
        if self._ops is not None:
            return self._ops.new_cache(kv_heads, num_rows, dim)
        keys, values = (
            torch.zeros(kv_heads, num_rows, dim, dtype=self.dtype, device=self.device) for _ in range(2)
        )
        return keys, values


def _linear(layer: Linear, x: Tensor, lora: LoraBackend | None, index: int, group: str) -> Tensor:
    out = layer(x)
    if lora is not None:
        lora.apply(x, out, index, group)
    return out
