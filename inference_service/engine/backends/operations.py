"""Operations in plain torch, which a kind of device overrides where it has better ones; and a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding

from inference_service.core.computing import Computing
from inference_service.engine.backends.base import (
    Attention,
    Delta,
    LayerHeads,
    LayerInputs,
    LayerOutputs,
    Layers,
    LoraBackend,
    Rotation,
    StepLora,
)
from inference_service.engine.kernels.attention import Context, KeysValues, PagedAttention
from inference_service.engine.kernels.blocks import WeightBlocks
from inference_service.engine.kernels.delta import StateChunk, reference
from inference_service.engine.kernels.experts import ByExpert, Routed, reference as of_experts
from inference_service.engine.kernels.rows import Activation
from inference_service.engine.kernels.rows.reference import ACTIVATIONS
from inference_service.engine.kernels.sampling import Drawn, RowParams, draw_rows, scores
from inference_service.engine.kernels.sgmv import Update
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.layers.quantized import new_linear
from inference_service.engine.layers.rope import Rope, rotate
from loramux_shared.bases.memory import Keeps
from loramux_shared.bases.rope import AttentionSpec, HeadCounts
from loramux_shared.runtime import Rounding


class Operations:
    """Operations in plain torch, on any device; T rows of all sequences stand one after the other."""

    by_row = False
    """True if a row's results depend on nothing but the row, to the last bit."""
    tumbles = True
    """True if attention knows windows that stand one behind the other."""
    keeps: Keeps = "nothing"
    """Weights of few bits that are multiplied as checkpoints keep them, instead of widened at load."""

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
        """Return a linear of a weight [out, in], rounded to fewer bits, in the layout that is read fastest.

        It stays as it is where its sizes do not allow the rounding.
        """
        return new_linear(weight, bias, quantization)

    def new_blocks(self, parts: Sequence[WeightBlocks], bias: Tensor | None = None) -> Linear:
        """Return a linear of weights of blocks, one behind the other."""
        return self.new_linear(torch.cat([part.widened().to(self._dtype) for part in parts]), bias)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Return what a linear makes of x [T, in], [T, out]."""
        return layer(x)

    def apply_with_lora(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """Return [T, out] of a group of layer ``index``, with what adapters add to it."""
        out = self.linear(layer, x)
        lora.apply(x, out, index, group)
        return out

    def apply_deferring_lora(
        self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Return [T, out] of the base, and the adapters' update for the operation that reads it.

        The update is None where the output has it already.
        """
        return self.apply_with_lora(layer, x, lora, index, group), None

    def apply_experts_with_lora(
        self,
        layer: Grouped,
        x: Tensor,
        lora: StepLora,
        index: int,
        group: str,
        pairs: ByExpert,
        *,
        of_tokens: bool = False,
    ) -> Tensor:
        """Return [pairs, out] of a group of all experts, adapters included; x is by place, or by token."""
        if not lora.adapts_experts(index):
            return layer(x, pairs, of_tokens=of_tokens)
        rows = x.index_select(0, pairs.tokens) if of_tokens else x
        out = layer(rows, pairs)
        lora.apply_experts(rows, out, index, group, pairs)
        return out

    def apply_experts_deferring_lora(
        self, layer: Grouped, x: Tensor, lora: StepLora, index: int, group: str, pairs: ByExpert
    ) -> tuple[Tensor, Update | None]:
        """Return [pairs, out] of the base for x [T, in] by token, and the adapters' update, as for a linear."""
        return self.apply_experts_with_lora(layer, x, lora, index, group, pairs, of_tokens=True), None

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `Rope.at` [T, 1, dim] for positions [T]."""
        return rope.at(positions)

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """Return the rows [T, hidden] of a table by tokens [T], times a scale of the table's dtype."""
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
        """Add delta, normed itself where it has a norm, to hidden [T, dim] in place; return hidden normed.

        Where out [T, dim] is given, the result is in it.
        """
        if delta is not None:
            hidden += delta if delta_norm is None else delta_norm(delta)
        normed = norm(hidden)
        return normed if out is None else out.copy_(normed)

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """Add x [T, dim] to out in place, and return it."""
        return out.add_(x)

    def scale(self, out: Tensor, factor: float) -> Tensor:
        """Multiply out [T, dim] by a factor in place, and return it."""
        return out.mul_(factor)

    def gated(self, gate_up: Tensor, activation: Activation, update: Update | None = None) -> Tensor:  # noqa: ARG002 - nothing is deferred here
        """Return activation(gate) * up [T, intermediate] of both side by side, with a deferred update."""
        gate, up = gate_up.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def activated(self, x: Tensor, activation: Activation, update: Update | None = None) -> Tensor:  # noqa: ARG002 - nothing is deferred here
        """Return activation(x) [T, intermediate], of an MLP without a gate, with a deferred update."""
        return ACTIVATIONS[activation](x)

    def run_layers(self, layers: Layers, inputs: LayerInputs) -> LayerOutputs:
        """Return what layers compute of a step; it is valid until the next call for the same cache.

        A device may replay what they did before for a step of the same shape, so layers must do the same
        operations with the same weights in every such step.
        """
        return layers(inputs.hidden, inputs.attention, inputs.rotations)

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Return tanh(logits / cap) * cap, for which logits may be reused."""
        return torch.tanh(logits / cap) * cap

    def new_grouped(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        quantization: Rounding = Rounding.NONE,
    ) -> Grouped:
        """Return a linear of each expert, of weights [out, in] and biases [out], rounded as those of others.

        Kernels that take all experts at once do not round them.
        """
        every: Sequence[Tensor | None] = biases or [None] * len(weights)
        pairs = zip(weights, every, strict=True)
        return Grouped([self.new_linear(weight, bias, quantization) for weight, bias in pairs], self.linear)

    def route(self, logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
        """Return the experts with the largest logits [T, E], and their probabilities."""
        return of_experts.route(logits, top_k, renormalised=renormalised)

    def by_expert(self, routed: Routed, num_experts: int) -> ByExpert:
        """Sort the pairs of a token and an expert."""
        return of_experts.by_expert(routed.ids, num_experts)

    def combine(self, y: Tensor, routed: Routed, pairs: ByExpert) -> Tensor:
        """Return the weighted sums [T, N] of each token's places of y [pairs, N]."""
        each = y.index_select(0, pairs.places).view(*routed.ids.shape, -1)
        weights = routed.weights[..., None]
        out = each[:, 0] * weights[:, 0]
        for index in range(1, pairs.top_k):  # in this order, in every batch
            out += each[:, index] * weights[:, index]
        return out.to(y.dtype)

    def clamped(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Return (up + 1) * gate * sigmoid(alpha * gate) [T, I] of both side by side, clamped before."""
        return of_experts.clamped(gate_up, alpha, limit, torch.float32).to(gate_up.dtype)

    def add_gated(self, out: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Add x [T, N] times the sigmoid of gate [T, 1] to out [T, N] in place, and return it."""
        return out.add_(torch.sigmoid(gate) * x)

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return x [T, N] times the sigmoid of gate [T, N]."""
        return x * torch.sigmoid(gate)

    def squares(self, x: Tensor) -> Tensor:
        """Return the mean square [T] of each row of x [T, N], in float32."""
        return x.float().square().mean(1)

    def recurrence(self, chunks: Sequence[StateChunk]) -> Delta:
        """Plan how a step takes the states of its sequences on."""
        return partial(reference.gated_delta, chunks=chunks)

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Plan the attention of a step, for groups of layers with these windows."""
        return TorchAttention(PagedAttention(contexts, block_size, self._dtype, self._device, windows))

    def draw(self, logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
        """Draw a token for each row of logits [N, vocab], on the host."""
        return draw_rows(logits, rows)

    def scores(self, logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        """Score tokens ids [N] in rows of logits [N, vocab], as `kernels.sampling.scores` does."""
        return scores(logits, ids, count)

    def new_cache(self, num_rows: int, heads: HeadCounts) -> tuple[Tensor, ...]:
        """Return empty keys and values of one layer, for num_rows tokens, a multiple of the block size.

        A cache of 8 bits has their scales behind them.
        """
        return KeysValues.allocate(heads.kv, num_rows, heads.dim, self._cache_dtype, self._device).tensors


class Grouped:
    """A linear of each expert, one product for each that has tokens, which the host asks for."""

    def __init__(self, linears: Sequence[Linear], product: Callable[[Linear, Tensor], Tensor]) -> None:
        self._linears, self._product = linears, product

    def __call__(self, x: Tensor, pairs: ByExpert, *, of_tokens: bool = False) -> Tensor:
        """Return [pairs, out] of x [pairs, in] by place, or [T, in] by token."""
        rows = x.index_select(0, pairs.tokens) if of_tokens else x
        parts = [
            self._product(self._linears[expert], rows[first:end]) for expert, first, end in pairs.tiles.tolist()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class TorchAttention:
    """Attention in plain torch."""

    def __init__(self, plan: PagedAttention) -> None:
        self._plan = plan

    def prepare_rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """Return both unchanged."""
        return cos, sin

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Rotate queries and keys together, then gather and attend."""
        heads, keys, norm = layer.heads, layer.keys, layer.norm
        queries, rotated = parts(heads, len(keys), layer.spec)
        if norm is not None:
            heads = normed(heads, len(norm.weight), norm)
        qk = rotate(heads[:, :rotated], *layer.rotation)
        q, k, v = qk[:, :queries], qk[:, queries:], heads[:, rotated:]
        out = self._plan(q, k, v, KeysValues(keys, layer.values, layer.scales), layer.spec, layer.sinks)
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


@dataclass(frozen=True)
class Backend:
    """The parts that run a model on a kind of device."""

    device: torch.device
    dtype: torch.dtype
    operations: Operations
    new_lora: Callable[[], LoraBackend]
    """Makes an empty home for adapters."""
    computing: Computing
    """Description of the device and the operations, for operators."""
    quantization: Rounding = Rounding.NONE
    """Rounding of the weights of linears."""
    cache_dtype: torch.dtype | None = None
    """The type of keys and values; None: that of all else."""
    recordable: bool = False
    """True if steps can be recorded and replayed.

    Launches follow from buffers that stay where they are, and `new_lora` makes a `TritonLora`.
    """
