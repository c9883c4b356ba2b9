"""An adapter as a backend computes with it: one flat piece that may lie anywhere in its bank."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_service.engine.lora.vocabulary import ROUND, Packing, Vocabulary, padded
from inference_service.engine.lora.weights import AdapterWeights, Numbers
from loramux_shared.bases.groups import GroupShape


@dataclass(frozen=True)
class PackedAdapter:
    """A packed adapter in the host's memory; nothing else of the adapter is needed."""

    matrices: Tensor
    """[elements], in the type that is computed in."""
    table: Numbers
    """Entries of the backend for a slot, with places from the beginning of the piece."""
    ranks: Numbers
    """[layers, modules], in the order of the groups; 0 where a module is not adapted."""
    linears: npt.NDArray[np.bool_]
    """[layers, groups]: whether it adds to a fused linear, or has vectors there."""
    vocabulary: Packing | None = None
    """Layout of its changes outside of the layers, at the end of the matrices."""

    def vocabulary_in(self, flat: Tensor) -> Vocabulary | None:
        """Return views of that in the piece, in any copy of it; None where there is nothing."""
        return (
            None if self.vocabulary is None else self.vocabulary.read(flat[len(flat) - self.vocabulary.numel :])
        )

    @property
    def num_bytes(self) -> int:
        """Return its bytes of the bank."""
        return self.matrices.nbytes

    @property
    def max_rank(self) -> int:
        """The largest."""
        return int(self.ranks.max(initial=0))


class Layout:
    """The order of an adapter's parts: per layer and group A of all slices, then each B; at the end the
    vectors, c and then d of each module that has some, in float32 and padded to `ROUND` values.
    """

    def __init__(
        self, shapes: tuple[GroupShape, ...], *, width: int = ROUND, columns: int = 1, ranks: int = 1
    ) -> None:
        """Take what the rows of A, the columns of B and the ranks of B are rounded up to, in elements."""
        sizes = [len(shape.modules) for shape in shapes]
        self.shapes: Final = shapes
        self.firsts: Final = [sum(sizes[:index]) for index in range(len(sizes))]
        """The first module of each group."""
        self.in_features: Final = np.repeat([shape.in_features for shape in shapes], sizes)
        """[modules]"""
        self.out_features: Final = np.array([out for shape in shapes for out in shape.out_features])
        """[modules]"""
        self.strides: Final = _up(self.in_features, width)
        """[modules]: elements from row to row of A."""
        self._columns = _up(self.out_features, columns)
        self._ranks = ranks
        order: list[int] = []
        for first, size in zip(self.firsts, sizes, strict=True):
            order += range(first, first + size)
            order += range(sum(sizes) + first, sum(sizes) + first + size)
        self._order = np.array(order)

    def places(self, ranks: Numbers) -> tuple[Numbers, Numbers, int]:
        """Return the first elements of A and of B [layers, modules], and how many elements there are."""
        b = _up(_up(ranks, self._ranks) * self._columns, ROUND)
        sizes = np.concatenate([ranks * self.strides, b], axis=1)
        ordered = sizes[:, self._order]
        firsts = np.empty_like(sizes)
        firsts[:, self._order] = (np.cumsum(ordered) - ordered.ravel()).reshape(ordered.shape)
        modules = len(self.strides)
        return firsts[:, :modules], firsts[:, modules:], int(sizes.sum())

    def linears(self, ranks: Numbers, vectors: Numbers) -> npt.NDArray[np.bool_]:
        """Return on which fused linears [layers, groups] an adapter of such ranks and vectors acts."""
        return np.add.reduceat(ranks + vectors, self.firsts, axis=1) > 0

    def vectors(self, weights: AdapterWeights, numel: int, itemsize: int) -> tuple[Numbers, int]:
        """Return the first elements of vectors [layers, modules], and how many elements there are with them.

        They lie behind numel elements of itemsize bytes; 0 where a module has none, for none begins there.
        """
        places, end = np.zeros_like(weights.ranks), max(numel, ROUND) if weights.vectors else numel
        for layer, module in weights.vectors:
            places[layer, module] = end
            end += 2 * padded(int(self.out_features[module])) * FLOAT // itemsize
        return places, end


FLOAT: Final = 4
"""Bytes."""


def write_vectors(weights: AdapterWeights, places: Numbers, matrices: Tensor) -> None:
    """Write the vectors of an adapter to their places."""
    for place, (c, d) in weights.vectors.items():
        first, gap = int(places[place]), padded(len(c)) - len(c)
        values = torch.cat([pad(c.cpu(), (0, gap)), pad(d.cpu(), (0, gap))]).view(matrices.dtype)
        matrices[first : first + len(values)] = values


def _up(numbers: Numbers, to: int) -> Numbers:
    return -(-numbers // to) * to


Empty = Callable[[int, torch.dtype], Tensor]
"""Returns memory for so many elements of a type."""


def plain_memory(numel: int, dtype: torch.dtype) -> Tensor:
    """Return memory as torch takes it."""
    return torch.empty(numel, dtype=dtype)


def pack_flat(
    weights: AdapterWeights, layout: Layout, dtype: torch.dtype, empty: Empty = plain_memory
) -> PackedAdapter:
    """Pack row by row, as the kernels for GPUs and torch read it; the table is [layers, modules, 4].

    Its fields are the rank, the first element of A [rank, in], whose rows are rounded up to `ROUND` elements,
    the first of B [rank, out], and the first of the vectors, or 0.
    """
    ranks = weights.ranks
    first_a, first_b, numel = layout.places(ranks)
    places, end = layout.vectors(weights, numel, dtype.itemsize)
    matrices = empty(end, dtype)
    zeros = torch.zeros(max(ROUND, *layout.strides.tolist()), dtype=dtype)
    parts: list[Tensor] = []
    for layer in weights.layers:
        for shape, first in zip(layout.shapes, layout.firsts, strict=True):
            if shape.name not in layer:
                continue
            gap = int(layout.strides[first]) - shape.in_features
            group = layer[shape.name]
            of_a = [a for a in group.a if a is not None]
            parts += [(pad(a, (0, gap)) if gap else a).reshape(-1) for a in of_a]
            for b in (b for b in group.b if b is not None):
                parts += [b.reshape(-1), zeros[: -b.numel() % ROUND]]
    if parts:
        torch.cat([part.to(dtype) for part in parts], out=matrices[:numel])
    write_vectors(weights, places, matrices)
    table = np.stack([ranks, first_a, first_b, places], axis=-1)
    packed = PackedAdapter(matrices, table, ranks, layout.linears(ranks, places))
    return with_vocabulary(packed, weights, empty)


def with_vocabulary(
    packed: PackedAdapter, weights: AdapterWeights, empty: Empty = plain_memory
) -> PackedAdapter:
    """Return an adapter whose layers are packed with what it changes outside of them."""
    if weights.vocabulary is None:
        return packed
    packing = weights.vocabulary.packed(packed.matrices.dtype)
    first = padded(len(packed.matrices))
    matrices = empty(first + packing.numel, packed.matrices.dtype).zero_()
    matrices[: len(packed.matrices)] = packed.matrices
    packing.write(matrices[first:])
    return replace(packed, matrices=matrices, vocabulary=packing)
