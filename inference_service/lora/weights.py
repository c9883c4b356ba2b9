"""An adapter's matrices, arranged for the fused linears; exact ranks, no padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from loramux_shared.bases.groups import GroupShape
from loramux_shared.faults import BundleCorrupt


@dataclass(frozen=True)
class GroupWeights:
    """An adapter's part of one fused linear."""

    a: tuple[Tensor | None, ...]
    """Per slice A, [rank, in]; None where the slice is not adapted."""
    b: tuple[Tensor | None, ...]
    """Per slice B transposed, [rank, out] in whatever order of memory, scale included; None as in ``a``."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each slice; 0 where it is not adapted."""
        return tuple(0 if b is None else b.shape[0] for b in self.b)


@dataclass(frozen=True)
class AdapterWeights:
    """All of an adapter: per layer, the groups that it touches."""

    layers: tuple[dict[str, GroupWeights], ...]

    @property
    def num_bytes(self) -> int:
        """Memory of all matrices."""
        groups = [group for layer in self.layers for group in layer.values()]
        return sum(part.nbytes for group in groups for part in (*group.a, *group.b) if part is not None)


@dataclass(frozen=True)
class Matrices:
    """A row of a bundle as tensors."""

    layer: int
    module: str
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank], scale included."""


def pack_adapter(
    rows: Iterable[Matrices],
    groups: tuple[GroupShape, ...],
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AdapterWeights:
    """Arrange the rows of a bundle; rows that are of the type and on the device already are not copied.

    Raises:
        BundleCorrupt: a row for a layer or module that the base does not have, or of other dims; a row twice.
    """
    found: dict[tuple[int, str], Matrices] = {}
    for row in rows:
        if (row.layer, row.module) in found:
            raise BundleCorrupt(
                f"the bundle holds layer {row.layer} {row.module} twice. Rebuild the deployment."
            )
        found[row.layer, row.module] = row
    layers = []
    for layer in range(num_layers):
        packed: dict[str, GroupWeights] = {}
        for group in groups:
            parts = [found.pop((layer, module), None) for module in group.modules]
            for part, out in zip(parts, group.out_features, strict=True):
                if part is not None:
                    _check_dims(part, group.in_features, out)
            if any(part is not None for part in parts):
                packed[group.name] = GroupWeights(
                    a=tuple(None if part is None else part.a.to(device, dtype) for part in parts),
                    b=tuple(None if part is None else part.b.to(device, dtype).t() for part in parts),
                )
        layers.append(packed)
    if found:
        layer, module = next(iter(found))
        raise BundleCorrupt(
            f"the bundle holds {len(found)} rows that the base has no place for, for example layer {layer} "
            f"{module}; the base has {num_layers} layers. Rebuild the deployment for this base."
        )
    return AdapterWeights(tuple(layers))


def _check_dims(row: Matrices, in_features: int, out_features: int) -> None:
    found = (row.a.shape[1], row.b.shape[0])
    if found != (in_features, out_features):
        raise BundleCorrupt(
            f"layer {row.layer} {row.module}: the base expects (in, out) = {(in_features, out_features)}, "
            f"the bundle holds {found}. Rebuild the deployment for this base."
        )
