"""The blocks of layers, with their weights: each returns what is added to the hidden rows.

`Step` holds the values that all of them share in a forward pass. Each reads its weights, and raises
`CheckpointInvalid` where a tensor is missing, or has another shape than the config implies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from inference_service.engine.backends.base import (
    Attention,
    LayerHeads,
    Recurrence,
    Rotation,
    StepLora,
    no_recurrence,
)
from inference_service.engine.backends.operations import Grouped, Operations
from inference_service.engine.kernels.attention import MAX_UPDATED_DIM
from inference_service.engine.kernels.delta import DeltaInputs, DeltaStates, DeltaWeights
from inference_service.engine.kernels.experts import ByExpert
from inference_service.engine.kernels.sgmv import Update
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.models.reader import LayerReader, Reader
from loramux_shared.bases.layers import AttentionLayer, DeltaLayer, InputLayer
from loramux_shared.bases.shard import Shard

LayerCache = tuple[Tensor, ...]
"""A layer's cache of its sequences, as its mixer made it."""
Block = TypeVar("Block")
Blocks = Mapping[type, Callable[[LayerReader, Any], Block]]
"""Readers of blocks by the classes of the layers that they are given beside the reader of weights."""


@dataclass(frozen=True)
class CacheSize:
    """The size of the layers' caches."""

    rows: tuple[int, ...]
    """Tokens of each group of layers that see equally far, multiples of the block size; in the order of the
    windows of the config."""
    slots: int = 0
    """Slots for the states of sequences, in layers that carry one."""


@dataclass(frozen=True, eq=False)
class Cache:
    """The caches of all layers."""

    layers: tuple[LayerCache, ...]
    states: tuple[LayerCache, ...] = ()
    """The states [slots, ...] of each layer."""

    def copy_states(self, read: Tensor, written: Tensor) -> None:
        """Copy states from slots [n] to others [n]; all are read before any is written."""
        for state in chain.from_iterable(self.states):
            state.index_copy_(0, written, state.index_select(0, read))


class Ranks(Protocol):
    """The ranks that compute a decoder together, as one of them sees the others in a step."""

    shard: Shard

    def share(self, rows: Tensor) -> None:
        """Give all ranks the rows [T, hidden] of the first one."""

    def sum(self, partial: Tensor) -> Tensor:
        """Sum what each rank computed, in place; all have the same bits then."""


@dataclass(frozen=True)
class Step:
    """A forward pass under way."""

    operations: Operations
    attention: Attention
    cache: Cache
    lora: StepLora | None
    rotations: tuple[Rotation, ...]
    """Rotations of each of the decoder's ropes."""
    query_factors: Tensor | None
    """Factors of the queries, [T, 1]; None: no scaling."""
    recurrence: Recurrence = no_recurrence
    ranks: Ranks | None = None

    def linear(self, layer: Linear, x: Tensor, index: int, group: str) -> Tensor:
        """Return what a fused linear of layer ``index`` makes of x [T, in], adapters included."""
        if self.lora is None:
            return self.operations.linear(layer, x)
        return self.operations.apply_with_lora(layer, x, self.lora, index, group)

    def apply_deferring_lora(
        self, layer: Linear, x: Tensor, index: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Return what a fused linear makes of x, and an update of adapters for the operation that reads it."""
        if self.lora is None:
            return self.operations.linear(layer, x), None
        return self.operations.apply_deferring_lora(layer, x, self.lora, index, group)

    def experts(
        self, layer: Grouped, x: Tensor, index: int, group: str, pairs: ByExpert, *, of_tokens: bool = False
    ) -> Tensor:
        """Return what the experts of layer ``index`` make of x by place, or by token; adapters included."""
        if self.lora is None:
            return layer(x, pairs, of_tokens=of_tokens)
        return self.operations.apply_experts_with_lora(
            layer, x, self.lora, index, group, pairs, of_tokens=of_tokens
        )

    def apply_experts_deferring_lora(
        self, layer: Grouped, x: Tensor, index: int, group: str, pairs: ByExpert
    ) -> tuple[Tensor, Update | None]:
        """Return what the experts make of x by token, and an update of adapters for what reads it."""
        if self.lora is None:
            return layer(x, pairs, of_tokens=True), None
        return self.operations.apply_experts_deferring_lora(layer, x, self.lora, index, group, pairs)

    def summed(self, partial: Tensor) -> Tensor:
        """Sum what each rank computed, in place."""
        return partial if self.ranks is None else self.ranks.sum(partial)


class Mlp(Protocol):
    """The part of a layer behind its mixer, which computes each row by itself."""

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        ...


class MixerBlock(ABC):
    """The part of a layer that mixes the rows of a sequence, and keeps what later rows need; here nothing."""

    def new_cache(self, operations: Operations, size: CacheSize) -> LayerCache:  # noqa: ARG002
        """Return an empty cache of what it keeps of every token."""
        return ()

    def new_states(self, size: CacheSize) -> LayerCache:  # noqa: ARG002
        """Return the states of every slot."""
        return ()

    @abstractmethod
    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""


class AttentionBlock(MixerBlock):
    """Attends over the cache, which it writes."""

    def __init__(self, reader: LayerReader, spec: AttentionLayer) -> None:
        """Read the weights."""
        config, names = reader.config, reader.config.names
        self._index = reader.index
        self._cache = self._index if spec.attention.keys_of is None else spec.attention.keys_of
        self._spec = spec
        first = "attn_heads" if spec.by_head else "attn_q"
        self._qkv_group, self._o_group = (reader.group(name).name for name in (first, "attn_dense"))
        self._rope = config.ropes.index(spec.rope)
        self._window = config.windows.index(spec.attention.window)
        projected = names.qkv[: len(reader.group(first).modules)]
        self._qkv = reader.linear(first, projected, bias=config.qkv_bias)
        self._o = reader.linear("attn_dense", (names.o,), bias=config.o_bias)
        self._sinks = None
        if names.sinks is not None:
            self._sinks = reader.sinks(names.sinks, spec.num_heads)
        self._head_norm = self._row_norms = None
        if names.q_norm is not None and names.k_norm is not None:
            if config.qk_norm_of_heads:
                self._head_norm = reader.head_norm(names.q_norm, names.k_norm, spec)
            else:
                q, k, *_ = reader.group(first).out_features
                self._row_norms = (
                    reader.row_norm(names.q_norm, q, spec.q_features),
                    reader.row_norm(names.k_norm, k, spec.kv_features),
                )

        self._reads_qkv = (
            spec.gated or spec.values_are_keys or self._row_norms is not None or spec.head_dim > MAX_UPDATED_DIM
        )
        """Whether anything but attention needs heads with what adapters add to them."""

    def new_cache(self, operations: Operations, size: CacheSize) -> LayerCache:
        """Return an empty cache of keys and values; none where another layer's are read."""
        if self._spec.attention.keys_of is not None:
            return ()
        return operations.new_cache(size.rows[self._window], self._spec.heads)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        spec = self._spec
        gate = update = None
        keys, values, *eight_bits = step.cache.layers[self._cache]
        scales = eight_bits[0] if eight_bits else None
        if self._reads_qkv or step.query_factors is not None or scales is not None:
            qkv = step.linear(self._qkv, x, self._index, self._qkv_group)
        else:
            qkv, update = step.apply_deferring_lora(self._qkv, x, self._index, self._qkv_group)
        if spec.gated:
            qkv, gate = self._parted(qkv)
        qkv = self._prepared(step, qkv)
        heads = qkv.view(len(x), -1, spec.head_dim)
        if spec.values_are_keys and spec.attention.keys_of is None:
            heads = torch.cat([heads, heads[:, spec.num_heads :]], dim=1)
        rotation, norm, sinks = step.rotations[self._rope], self._head_norm, self._sinks
        layer = LayerHeads(heads, rotation, keys, values, spec.attention, norm, sinks, scales, update)
        attended = step.attention(layer)
        if gate is not None:
            attended = step.operations.gate(attended, gate)
        return step.linear(self._o, attended, self._index, self._o_group)

    def _parted(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Part queries from gates, of which each head has its own behind it: rows without gates, and gates."""
        spec, rows = self._spec, len(qkv)
        both = qkv[:, : 2 * spec.q_features].view(rows, spec.num_heads, 2, spec.head_dim)
        queries, gate = (both[:, :, part].reshape(rows, -1) for part in range(2))
        return torch.cat([queries, qkv[:, 2 * spec.q_features :]], dim=1), gate

    def _prepared(self, step: Step, qkv: Tensor) -> Tensor:
        """Norm and scale queries and keys in place, as far as attention does not."""
        if self._row_norms is None and step.query_factors is None:
            return qkv
        q = self._spec.q_features
        queries, keys = qkv[:, :q], qkv[:, q : q + self._spec.kv_features]
        if self._row_norms is not None and step.ranks is not None:
            _norm_together(step.operations, step.ranks, (queries, keys), self._row_norms)
        elif self._row_norms is not None:
            for rows, norm in zip((queries, keys), self._row_norms, strict=True):
                step.operations.norm(rows, norm, None, None, out=rows)
        if step.query_factors is not None:
            queries *= step.query_factors
        return qkv


def _norm_together(
    operations: Operations, ranks: Ranks, parts: Sequence[Tensor], norms: Sequence[RMSNorm]
) -> None:
    """Norm rows [T, own columns] in place by the size of all ranks' columns, of which each has as many."""
    squares = ranks.sum(torch.stack([*map(operations.squares, parts)])) / ranks.shard.world
    for rows, norm, square in zip(parts, norms, squares, strict=True):
        rows *= torch.rsqrt(square + norm.eps)[:, None]
        rows *= norm.weight


class DeltaBlock(MixerBlock):
    """Reads each sequence's state, and takes it behind the step's rows."""

    def __init__(self, reader: LayerReader, spec: DeltaLayer) -> None:
        """Read the weights."""
        names, rounded = reader.config.names.delta, reader.reader.rounded
        self._index = reader.index
        self._spec = spec
        group, out = reader.group("delta_qkv"), reader.group("delta_out")
        channels, *_, heads = group.out_features
        self._in_group, self._out_group = group.name, out.name
        self._parts = [spec.channels, spec.value_features, spec.value_heads, spec.value_heads]
        self._in = reader.linear("delta_qkv", names.inputs)
        self._out = reader.linear("delta_out", (names.out,))
        taps = reader.own("delta_qkv", names.conv, (channels, 1, spec.conv_width)).squeeze(1)
        self._weights = DeltaWeights(
            conv=rounded(taps.t()).contiguous(),
            decay=-rounded(reader.own("delta_a", names.decay, (heads,))).float().exp(),
            dt_bias=rounded(reader.own("delta_a", names.dt_bias, (heads,))).float(),
            norm=rounded(reader.get(f"{names.norm}.weight", (spec.value_dim,))),
            eps=reader.config.norm_eps,
        )

    def new_states(self, size: CacheSize) -> LayerCache:
        """Return the rows that the convolution keeps, and the states: of every slot."""
        spec = self._spec
        states = DeltaStates.allocate(size.slots, spec.conv_shape, spec.state_shape, like=self._weights.conv)
        return states.conv, states.recurrent

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        fused = step.linear(self._in, x, self._index, self._in_group)
        qkv, z, b, a = torch.split(fused, self._parts, dim=1)
        states = DeltaStates(*step.cache.states[self._index])
        mixed = step.recurrence.delta(DeltaInputs(qkv, z, b, a, self._weights, states))
        return step.linear(self._out, mixed, self._index, self._out_group)


Place = tuple[str, tuple[str, ...]]
"""A module of a fused linear, and the names of its tensors, as `LayerReader.linear` takes them."""


class MlpBlock:
    """activation(gate x) * up x, or activation(up x), and down again."""

    def __init__(self, reader: LayerReader, gate_up: Place, down: Place, *, bias: bool) -> None:
        """Read the weights of two linears."""
        self._index = reader.index
        self._activation = reader.config.activation
        self._up_group, self._down_group = (reader.group(module).name for module, _ in (gate_up, down))
        self._gated = len(reader.group(gate_up[0]).modules) > 1
        self._gate_up = reader.linear(*gate_up, bias=bias)
        self._down = reader.linear(*down, bias=bias)

    @classmethod
    def of_layer(cls, reader: LayerReader) -> MlpBlock:
        """Read that of a layer."""
        config = reader.config
        names, bias = config.names, config.mlp_bias
        return cls(reader, ("mlp_h_to_4h", names.gate_up), ("mlp_4h_to_h", (names.down,)), bias=bias)

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return [T, hidden] for x [T, hidden]."""
        up, update = step.apply_deferring_lora(self._gate_up, x, self._index, self._up_group)
        activate = step.operations.gated if self._gated else step.operations.activated
        return step.linear(self._down, activate(up, self._activation, update), self._index, self._down_group)


class Inputs:
    """The inputs of all layers, made once for a step: rows of a table, and a projection of the embedding."""

    def __init__(self, reader: Reader, spec: InputLayer) -> None:
        """Read the weights."""
        dims, names = reader.config.dims, reader.config.names.inputs
        self._layers, self._width = dims.num_layers, spec.width
        widths = dims.num_layers * spec.width
        self._table = reader.rounded(reader.get(f"{names.table}.weight", (spec.vocab, widths)))
        # Rounded as the weights are, as the scale of the embedding is.
        self._table_scale = float(reader.rounded(torch.tensor(spec.width**0.5)))
        projection = reader.get(f"{names.projection}.weight", (widths, dims.hidden))
        self._projection = reader.operations.new_linear(reader.rounded(projection), None)
        self._scale = dims.hidden**-0.5
        self._norm = reader.norm(names.norm, spec.width)

    def __call__(self, operations: Operations, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return [T, layers, width] for tokens [T] and their embeddings [T, hidden]."""
        embedded = operations.embed(tokens, self._table, self._table_scale)
        projected = operations.linear(self._projection, hidden).mul_(self._scale)
        projected = operations.norm(projected.view(-1, self._width), self._norm, None, None)
        return (
            (projected.view_as(embedded) + embedded).mul_(2**-0.5).view(len(tokens), self._layers, self._width)
        )


class InputBlock:
    """Lets a layer's inputs in: a gate of the hidden rows, and a projection back to them."""

    def __init__(self, reader: LayerReader) -> None:
        """Read the weights."""
        names = reader.config.names.inputs
        self._index = reader.index
        self._activation = reader.config.activation
        self._gate = reader.linear("layer_input_gate", (names.gate,))
        self._projection = reader.linear("layer_input_projection", (names.layer_projection,))
        self.out_norm = reader.norm(names.out_norm)

    def __call__(self, step: Step, x: Tensor, inputs: Tensor) -> Tensor:
        """Return [T, hidden] for hidden rows x [T, hidden] and the inputs [T, layers, width]."""
        gate = step.linear(self._gate, x, self._index, "layer_input_gate")
        both = torch.cat([gate, inputs[:, self._index]], dim=1)
        gated = step.operations.gated(both, self._activation)
        return step.linear(self._projection, gated, self._index, "layer_input_projection")
