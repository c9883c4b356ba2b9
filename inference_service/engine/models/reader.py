"""The weights of a decoder, from where its checkpoint keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.blocks import WeightBlocks
from inference_service.engine.kernels.rounded import PackedWeight, packed_halves
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import LayerNorm, RMSNorm
from inference_service.engine.layers.on_gpu import PackedLinear
from inference_service.engine.lora.weights import AdapterWeights, GroupWeights
from inference_service.engine.models.checkpoint import Tensors
from inference_service.engine.models.packed import Integers, Kept
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bases.layers import AttentionLayer
from loramux_shared.bases.shard import Shard
from loramux_shared.runtime import Rounding

Table = Tensor | WeightBlocks
"""Embeddings, or a head."""


class Reader:
    """Reads the parts of a decoder."""

    def __init__(
        self,
        checkpoint: Tensors,
        config: ModelConfig,
        dtype: torch.dtype,
        operations: Operations,
        merged: AdapterWeights | None = None,
        quantization: Rounding = Rounding.NONE,
        shard: Shard | None = None,
    ) -> None:
        """Read from a checkpoint, which may be in a wider type than dtype; merged is added to the linears.

        The sum is made in the checkpoint's type, and rounded once, and that of linears again where it is said.
        With a shard, linears are its part, as config is.
        """
        self.shard = shard
        self.config = config
        self.operations = operations
        self.quantization = quantization
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._merged = merged
        names = config.names
        found = checkpoint.first([f"{prefix}{names.final_norm}.weight" for prefix in names.prefixes])
        self._prefix = found.removesuffix(f"{names.final_norm}.weight")

    def tables(self) -> tuple[Table, Table | None]:
        """Embeddings and head, both [vocab, hidden]; of a tied model one table. Rank 0 alone has some.

        The head is None where a model that makes vectors and scores alone lacks it.

        As in transformers, a checkpoint counts before its config: what is tied may stand under either name, and
        where it stands under both with different values it is not tied.
        """
        config, checkpoint = self.config, self._checkpoint
        if self.shard is not None and not self.shard.is_first:
            unread = torch.zeros(1, config.dims.hidden, dtype=self._dtype, device=checkpoint.device)
            return unread, unread
        embedding = f"{self._prefix}{config.names.embedding}.weight"
        head = checkpoint.first([f"{name}.weight" for name in config.names.heads])
        lacking = config.for_vectors and not config.tied_embeddings and not checkpoint.has(head)
        if not config.has_head or lacking:
            return self._table(embedding), None
        if config.tied_embeddings and not (checkpoint.has(embedding) and checkpoint.has(head)):
            only = self._table(head if checkpoint.has(head) else embedding)
            return only, only
        first, last = self._table(embedding), self._table(head)
        if not config.tied_embeddings or isinstance(first, WeightBlocks) or isinstance(last, WeightBlocks):
            return first, last
        return first, first if torch.equal(first, last) else last

    def _table(self, name: str) -> Table:
        dims = self.config.dims
        if self.operations.keeps == "blocks" and self.quantization.of_head is Rounding.NONE:
            kept = self._checkpoint.kept([(name, (dims.vocab, dims.hidden))], WeightBlocks)
            if kept is not None and isinstance(kept[0], WeightBlocks):
                return kept[0]
        return self._checkpoint.get(name, (dims.vocab, dims.hidden)).to(self._dtype)

    def head_bias(self) -> Tensor:
        """Return the bias [vocab] of the head."""
        head = self._checkpoint.first([f"{name}.bias" for name in self.config.names.heads])
        return self.rounded(self._checkpoint.get(head, (self.config.dims.vocab,)))

    def layer(self, index: int) -> LayerReader:
        """Return a reader of one layer."""
        merged = self._merged.layers[index] if self._merged else {}
        at = self.config.names.layer.format(index=index)
        whole = self.config if self.shard is None else self.shard.whole
        return LayerReader(self, index, at, whole.layer_groups[index], merged)

    def has(self, name: str) -> bool:
        """Return True if there is a tensor behind the prefix."""
        return self._checkpoint.has(self._prefix + name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor behind the prefix that is not of few bits; None where there is none."""
        return self._checkpoint.shape(self._prefix + name)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor behind the prefix, in the type of the checkpoint's reader or another."""
        return self._checkpoint.get(self._prefix + name, shape, dtype)

    def kept(self, names: list[tuple[str, tuple[int, ...]]]) -> list[Kept] | None:
        """Return weights behind the prefix as the device multiplies them, where all are of few bits."""
        keeps = WeightBlocks if self.operations.keeps == "blocks" else Integers
        return self._checkpoint.kept([(self._prefix + name, shape) for name, shape in names], keeps)

    def packed_linear(self, parts: Sequence[Kept], bias: Tensor | None) -> Linear:
        """Return a linear of weights as they are kept, one behind the other."""
        added = None if bias is None else self.rounded(bias)
        blocks = [part for part in parts if isinstance(part, WeightBlocks)]
        if blocks:
            return self.operations.new_blocks(blocks, added)
        return PackedLinear(_joined([part for part in parts if isinstance(part, Integers)]), added)

    def rounded(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the type that is computed in."""
        return tensor.to(self._dtype)

    def norm(self, name: str, width: int | None = None) -> RMSNorm:
        """Return a norm of rows of ``hidden``, or of another width."""
        config, shape = self.config, (width or self.config.dims.hidden,)
        weight = self.rounded(self.get(f"{name}.weight", shape))
        if not config.layer_norm:
            return RMSNorm(weight, config.norm_eps, config.norm_offset)
        bias = self.rounded(self.get(f"{name}.bias", shape)) if config.norm_bias else None
        return LayerNorm(weight, config.norm_eps, bias)


@dataclass(frozen=True)
class LayerReader:
    """Reads the parts of a layer, by their names within it."""

    reader: Reader
    index: int
    at: str
    """Before the names of its tensors."""
    groups: tuple[GroupShape, ...]
    """Fused linears as the checkpoint has them: those of all ranks together."""
    merged: dict[str, GroupWeights] = field(default_factory=dict)
    """Weights to add, by the names of groups."""

    @property
    def config(self) -> ModelConfig:
        """The decoder's."""
        return self.reader.config

    @property
    def operations(self) -> Operations:
        """Return the operations of the device."""
        return self.reader.operations

    def with_merged(self, weight: Tensor, shape: GroupShape) -> Tensor:
        """Return the weight [out, in] of a group with what is added to it."""
        return _merge(weight, self.merged[shape.name], shape) if shape.name in self.merged else weight

    def group(self, module: str) -> GroupShape:
        """Return the fused linear that has a module, by its bundle name."""
        return next(group for group in self.groups if module in group.modules)

    def linear(self, module: str, names: tuple[str, ...], *, bias: bool = False) -> Linear:
        """Return the fused linear that has a module; names are those of its slices, or of one for all."""
        shape = self.group(module)
        outs = shape.out_features
        sizes = outs if len(names) == len(outs) else (sum(outs),)
        parts = list(zip(names, sizes, strict=True))
        kept = self._packed(shape, parts)
        biases = self.cat([(f"{name}.bias", (out,)) for name, out in parts]) if bias else None
        biases = None if biases is None else _in_order(biases, shape)
        if kept is not None:
            return self.reader.packed_linear(kept, self._own(biases, shape))
        weight = self.cat([(f"{name}.weight", (out, shape.in_features)) for name, out in parts])
        weight = _in_order(weight, shape)
        weight, biases = self.with_merged(weight, shape), self._with_vectors(biases, weight, shape)
        weight, biases = self.part(weight, biases, shape)
        rounded = self.reader.rounded
        added = None if biases is None else rounded(biases)
        return self.operations.new_linear(rounded(weight), added, self.reader.quantization)

    def part(self, weight: Tensor, bias: Tensor | None, shape: GroupShape) -> tuple[Tensor, Tensor | None]:
        """Return the rank's part of a group's weight [out, in] and bias [out]; one of a sum is of one rank."""
        shard = self.reader.shard
        if shard is None:
            return weight, bias
        rows = torch.cat(self._rows(shape, shape.out_offsets))
        return weight[rows, shard.part(shape).inputs], self._own(bias, shape)

    def _own(self, bias: Tensor | None, shape: GroupShape) -> Tensor | None:
        shard = self.reader.shard
        if bias is None or shard is None:
            return bias
        is_sum = shard.part(shape).is_sum
        return None if is_sum and not shard.is_first else bias[torch.cat(self._rows(shape, shape.out_offsets))]

    def _rows(self, shape: GroupShape, offsets: Sequence[int]) -> list[Tensor]:
        """Return the rank's rows of each slice of a group, which begin at offsets; without ranks all."""
        shard, sizes = self.reader.shard, shape.out_features
        every = [torch.arange(at, at + size) for at, size in zip(offsets, sizes, strict=True)]
        if shard is None:
            return every
        return [rows[own] for rows, own in zip(every, shard.part(shape).outputs, strict=True)]

    def _packed(self, shape: GroupShape, parts: list[tuple[str, int]]) -> list[Kept] | None:
        """Return the parts of a group that are of few bits, where the device multiplies these."""
        reader, shard = self.reader, self.reader.shard
        whole = shape.name in self.merged or reader.quantization is not Rounding.NONE
        if whole or self.operations.keeps == "nothing":
            return None
        names = [(f"{name}.weight", (out, shape.in_features)) for name, out in parts]
        kept = reader.kept([(self.at + name, size) for name, size in names])
        if kept is None or (shard is None and not any(shape.orders)):
            return kept
        places = zip(self._rows(shape, [0] * len(shape.modules)), shape.orders, strict=True)
        every = [rows if order is None else torch.tensor(order)[rows] for rows, order in places]
        weights = kept
        if len(kept) < len(every):  # one for all slices
            weights, every = kept * len(every), [r + at for r, at in zip(every, shape.out_offsets, strict=True)]
        inputs = None if shard is None else shard.part(shape).inputs
        with suppress(ValueError):  # groups of columns that cannot be divided
            return [each.part(rows, inputs) for each, rows in zip(weights, every, strict=True)]
        return None

    def _with_vectors(self, bias: Tensor | None, weight: Tensor, shape: GroupShape) -> Tensor | None:
        """Return the bias [out] of a group as vectors that are merged make it: one, where there was none."""
        merged = self.merged.get(shape.name)
        if merged is None or not any(merged.vectors):
            return bias
        out = weight.new_zeros(sum(shape.out_features)) if bias is None else bias.clone()
        for own, offset, size in zip(merged.vectors, shape.out_offsets, shape.out_features, strict=True):
            if own is not None:
                c, d = (each.to(out) for each in own)
                out[offset : offset + size] = torch.addcmul(d, out[offset : offset + size], c)
        return out if bias is not None or out.any() else None

    def has(self, name: str) -> bool:
        """Return True if the layer has a tensor."""
        return self.reader.has(self.at + name)

    def norm(self, name: str, width: int | None = None) -> RMSNorm:
        """Return a norm."""
        return self.reader.norm(self.at + name, width)

    def row_norm(self, name: str, whole: int, own: int) -> RMSNorm:
        """Return the norm of rows of whole columns, of which each rank has so many."""
        norm, shard = self.norm(name, whole), self.reader.shard
        columns = slice(None) if shard is None else shard.piece(whole, own)
        return RMSNorm(norm.weight[columns].contiguous(), norm.eps, norm.offset)

    def optional_norm(self, name: str | None) -> RMSNorm | None:
        """Return a norm, where there is one."""
        return None if name is None else self.norm(name)

    def head_norm(self, q_norm: str, k_norm: str, spec: AttentionLayer) -> RMSNorm:
        """Return the norms of all heads of queries, keys and values that are normed, side by side."""
        counts = {q_norm: spec.num_heads}
        if spec.attention.keys_of is None:
            counts[k_norm] = spec.num_kv_heads
        shape = (spec.head_dim,)
        weights = [self.get(f"{name}.weight", shape).expand(count, -1) for name, count in counts.items()]
        if spec.values_normed and spec.attention.keys_of is None:
            plain = torch.full_like(weights[0][:1], 1.0 - self.config.norm_offset)
            weights.append(plain.expand(spec.num_kv_heads, -1))
        weight = self.reader.rounded(torch.cat(weights))
        return RMSNorm(weight, self.config.norm_eps, self.config.norm_offset)

    def sinks(self, name: str, heads: int) -> Tensor:
        """Return the scores [heads] of what every row of a query head sees besides, in float32."""
        shard = self.reader.shard
        ranks, rank = (1, 0) if shard is None else (shard.world, shard.rank)
        return self.get(name, (heads * ranks,)).float()[rank * heads :][:heads].contiguous()

    def own(self, module: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the rank's rows of a tensor that has one for each output of a module."""
        group, whole = self.group(module), self.get(name, shape)
        return whole[self._rows(group, [0] * len(group.modules))[group.modules.index(module)]]

    def cat(self, tensors: list[tuple[str, tuple[int, ...]]]) -> Tensor:
        """Return tensors of these names and shapes, one behind the other."""
        parts = [self.get(name, shape) for name, shape in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor, as `Reader.get`."""
        return self.reader.get(self.at + name, shape, dtype)


def _in_order(rows: Tensor, shape: GroupShape) -> Tensor:
    """Return a checkpoint's rows [out, ...] of a group in the order in which a decoder has them."""
    if not any(shape.orders):
        return rows
    parts = zip(torch.split(rows, list(shape.out_features)), shape.orders, strict=True)
    return torch.cat([part if order is None else part[list(order)] for part, order in parts])


def _joined(parts: Sequence[Integers]) -> PackedWeight:
    """Return the weight that parts are, one behind the other."""
    scales = torch.cat([part.scales for part in parts])
    zeros = None
    if any(part.zeros is not None for part in parts):
        every = (torch.zeros_like(p.scales, dtype=torch.int8) if p.zeros is None else p.zeros for p in parts)
        zeros = torch.cat([*every])
    values = torch.cat([packed_halves(part.numbers) for part in parts])
    return PackedWeight(values, scales, 4, parts[0].numbers.shape[1], zeros)


def _merge(weight: Tensor, adapter: GroupWeights, shape: GroupShape) -> Tensor:
    """Return weight [out, in] with the products of the adapter's slices added, and times their vectors."""
    merged = weight.clone()
    slices = zip(adapter.a, adapter.b, adapter.vectors, shape.out_offsets, shape.out_features, strict=True)
    for a, b, vectors, offset, size in slices:
        own = merged[offset : offset + size]
        if a is not None and b is not None:
            own.addmm_(b.t().to(weight), a.to(weight))
        if vectors is not None:
            own.mul_(vectors.c.to(weight)[:, None])
    return merged
