"""An adapter's matrices, arranged for the fused linears; exact ranks, no padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from inference_service.lora.vocabulary import Vocabulary
from loramux_shared.bases.groups import GroupShape, distinct
from loramux_shared.bundle.modules import BY_ID, BY_NAME
from loramux_shared.faults import BundleCorrupt

Numbers = npt.NDArray[np.int64]


class Vectors(NamedTuple):
    """A module's output y becomes c * y + d, for an adapter's own rows; both are float32 [out]."""

    c: Tensor
    d: Tensor


class Placed(NamedTuple):
    """A module of a layer, and where its matrices lie: A [rank, in], then B [out, rank], each row by row."""

    layer: int
    module_id: int
    rank: int
    in_features: int
    out_features: int
    first: int
    """Element of A's beginning."""
    expert: int | None = None
    """Whose module it is, of a mixture."""
    vectors: Vectors | None = None
    """What becomes of its output."""


@dataclass(frozen=True)
class GroupWeights:
    """An adapter's part of one fused linear."""

    a: tuple[Tensor | None, ...]
    """Per slice A, [rank, in]; None where the slice is not adapted."""
    b: tuple[Tensor | None, ...]
    """Per slice B transposed, [rank, out] in whatever order of memory, scale included; None as in ``a``."""
    vectors: tuple[Vectors | None, ...]
    """Per slice; None where its output stays what A and B make of it."""


@dataclass(frozen=True)
class AdapterWeights:
    """All of an adapter as it lies somewhere; its arrays are [layers, modules], in the order of the groups."""

    values: Tensor
    """[elements]: the scale is in B; what is between the matrices does not matter."""
    ranks: Numbers
    """0 where a module is not adapted."""
    first_a: Numbers
    """Where A [rank, in] begins."""
    first_b: Numbers
    """Where B [out, rank] begins."""
    groups: tuple[GroupShape, ...]
    vocabulary: Vocabulary | None = None
    """What it changes outside of the layers."""
    vectors: Mapping[tuple[int, int], Vectors] = field(default_factory=dict)
    """By layer and module."""

    @cached_property
    def layers(self) -> tuple[dict[str, GroupWeights], ...]:
        """Per layer, views of the groups that are adapted."""
        places = zip(self.ranks.tolist(), self.first_a.tolist(), self.first_b.tolist(), strict=True)
        return tuple(self._layer(layer, *place) for layer, place in enumerate(places))

    def _layer(
        self, layer: int, ranks: list[int], first_a: list[int], first_b: list[int]
    ) -> dict[str, GroupWeights]:
        found: dict[str, GroupWeights] = {}
        at = 0
        for shape in self.groups:
            own, inside = range(at, at + len(shape.modules)), shape.in_features
            at = own.stop
            vectors = tuple([self.vectors.get((layer, module)) for module in own]) if self.vectors else ()
            if not any(ranks[module] for module in own) and not any(vectors):
                continue
            a, b = [], []
            for module, out in zip(own, shape.out_features, strict=True):
                rank = ranks[module]
                a.append(self.values.as_strided((rank, inside), (inside, 1), first_a[module]) if rank else None)
                b.append(self.values.as_strided((rank, out), (1, rank), first_b[module]) if rank else None)
            found[shape.name] = GroupWeights(tuple(a), tuple(b), vectors or (None,) * len(own))
        return found


def arrange(values: Tensor, rows: Iterable[Placed], layers: Sequence[tuple[GroupShape, ...]]) -> AdapterWeights:
    """Arrange matrices that lie in values, for layers with these groups; nothing is copied.

    Raises:
        BundleCorrupt: a row for a layer or module that the base does not have, or of other dims; a row twice.
    """
    groups = distinct(layers)
    names = [module for group in groups for module in group.modules]
    features = [(group.in_features, out) for group in groups for out in group.out_features]
    columns = _columns(groups, layers)
    fields = [[(0, 0, 0)] * len(names) for _ in layers]
    strange: list[Placed] = []
    vectors: dict[tuple[int, int], Vectors] = {}
    for row in rows:
        layer, module_id, rank, inside, outside, first, expert, own = row
        column = columns[layer].get((module_id, expert)) if layer < len(layers) else None
        if column is None:
            strange.append(row)
            continue
        if fields[layer][column][0] or (layer, column) in vectors:
            raise BundleCorrupt(
                f"the bundle holds layer {layer} {names[column]} twice. Rebuild the deployment."
            )
        if (inside, outside) != features[column]:
            raise BundleCorrupt(
                f"layer {layer} {names[column]}: the base expects (in, out) = {features[column]}, "
                f"the bundle holds {inside, outside}. Rebuild the deployment for this base."
            )
        fields[layer][column] = rank, first, first + rank * inside
        if own is not None:
            vectors[layer, column] = own
    if strange:
        raise BundleCorrupt(
            f"the bundle holds {len(strange)} rows that the base has no place for, for example layer "
            f"{strange[0].layer} {BY_ID[strange[0].module_id].name}; the base has {len(layers)} layers. "
            "Rebuild the deployment for this base."
        )
    ranks, first_a, first_b = np.moveaxis(np.array(fields, dtype=np.int64), -1, 0)
    return AdapterWeights(values, ranks, first_a, first_b, groups, vectors=vectors)


def _columns(
    groups: tuple[GroupShape, ...], layers: Sequence[tuple[GroupShape, ...]]
) -> list[dict[tuple[int, int | None], int]]:
    """Return per layer, by id and expert, where its modules stand among those of all groups."""
    firsts, first = {}, 0
    for group in groups:
        firsts[group] = first
        first += len(group.modules)
    tables = {
        own: {
            (BY_NAME[module].id, group.expert): firsts[group] + index
            for group in own
            for index, module in enumerate(group.modules)
        }
        for own in dict.fromkeys(layers)
    }
    return [tables[own] for own in layers]
