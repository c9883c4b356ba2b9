"""Plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, silu

from inference_service.backends.base import (
    Attention,
    LayerInputs,
    LayerOutputs,
    Layers,
    Recurrence,
    StepLora,
    Turn,
)
from inference_service.backends.experts import ExpertOperations
from inference_service.kernels.attention import Context, KeysValues, PagedAttention
from inference_service.kernels.delta import DeltaInputs, StateChunk, reference
from inference_service.kernels.rows import Activation
from inference_service.kernels.sampling import Drawn, RowParams, draw_rows
from inference_service.kernels.sgmv import Update
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.quantized import new_linear
from inference_service.layers.rope import Rope, rotate
from loramux_shared.bases.rope import AttentionSpec, HeadCounts
from loramux_shared.runtime import Rounding

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


class TorchOperations(ExpertOperations):
    """Operations in plain torch, on any device."""

    by_row = False
    keeps_integers = False

    def __init__(
        self, dtype: torch.dtype, device: torch.device, cache_dtype: torch.dtype | None = None
    ) -> None:
        """Take what is computed in, and where, and the type of keys and values, if that is another."""
        self._dtype = dtype
        self._cache_dtype = cache_dtype or dtype
        self._device = device

    def new_linear(
        self, weight: Tensor, bias: Tensor | None = None, quantization: Rounding = Rounding.NONE
    ) -> Linear:
        """Return a linear with the library's products."""
        return new_linear(weight, bias, quantization)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """All rows at once."""
        return layer(x)

    def adapted(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """One after the other."""
        out = self.linear(layer, x)
        lora.apply(x, out, index, group)
        return out

    def begun(
        self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Nothing is left to be added."""
        return self.adapted(layer, x, lora, index, group), None

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """All positions at once."""
        return rope.at(positions)

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """Embed in one or two operations."""
        hidden = embedding(tokens, table)
        return hidden if scale == 1.0 else hidden * scale

    def norm(
        self,
        hidden: Tensor,
        norm: RMSNorm,
        delta: Tensor | None,
        delta_norm: RMSNorm | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """One after the other."""
        if delta is not None:
            hidden += delta if delta_norm is None else delta_norm(delta)
        normed = norm(hidden)
        return normed if out is None else out.copy_(normed)

    def gated(self, gate_up: Tensor, activation: Activation, update: Update | None = None) -> Tensor:  # noqa: ARG002 - `begun` has none
        """Two operations."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def run_layers(self, layers: Layers, inputs: LayerInputs) -> LayerOutputs:
        """Run them."""
        return layers(inputs.hidden, inputs.attention, inputs.turns)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Three operations."""
        return torch.tanh(logits / cap) * cap

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Two operations."""
        return x * torch.sigmoid(gate)

    def recurrence(self, contexts: Sequence[Context]) -> Recurrence:
        """Single rows together, longer chunks one after the other."""
        chunks = [StateChunk.of(context) for context in contexts]
        return partial(_gated_delta, chunks)

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Gather the contexts, once for all layers of a window."""
        return TorchAttention(PagedAttention(contexts, block_size, self._dtype, self._device, windows))

    def draw(self, logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
        """Draw row by row."""
        return draw_rows(logits, rows)

    def new_cache(self, num_rows: int, heads: HeadCounts) -> tuple[Tensor, ...]:
        """Return the tensors of `KeysValues`."""
        return KeysValues.allocate(heads.kv, num_rows, heads.dim, self._cache_dtype, self._device).tensors


def _gated_delta(chunks: Sequence[StateChunk], inputs: DeltaInputs) -> Tensor:
    return reference.gated_delta(inputs, chunks)


class TorchAttention:
    """Attention in plain torch."""

    def __init__(self, plan: PagedAttention) -> None:
        self._plan = plan

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """Return both unchanged."""
        return cos, sin

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
        sinks: Tensor | None = None,
        scales: Tensor | None = None,
        update: Update | None = None,  # noqa: ARG002 - `begun` has none
    ) -> Tensor:
        """Rotate queries and keys together, then gather and attend."""
        queries, rotated = parts(heads, len(keys), spec)
        if norm is not None:
            heads = normed(heads, len(norm.weight), norm)
        qk = rotate(heads[:, :rotated], *turn)
        q, k, v = qk[:, :queries], qk[:, queries:], heads[:, rotated:]
        out = self._plan(q, k, v, KeysValues(keys, values, scales), spec, sinks)
        return out.reshape(len(heads), -1)


def parts(heads: Tensor, kv: int, spec: AttentionSpec) -> tuple[int, int]:
    """Return how many heads [T, heads, d] are of queries, and how many of queries and keys."""
    count = heads.shape[1]
    return (count - 2 * kv, count - kv) if spec.keys_of is None else (count, count)


def normed(heads: Tensor, count: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Norm the first of the heads [T, heads, d]."""
    if count == heads.shape[1]:
        return norm(heads)
    return torch.cat([norm(heads[:, :count]), heads[:, count:]], dim=1)
