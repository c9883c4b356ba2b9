"""Adapters of matrices that are at hand, without a bundle."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from inference_service.engine.lora.weights import AdapterWeights, Placed, Vectors, arrange
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bundle.modules import BY_NAME

Row = tuple[int, str, Tensor, Tensor]
"""Layer, module, A [rank, in], B [out, rank]."""


def adapter_of(
    rows: Iterable[Row],
    layers: Sequence[tuple[GroupShape, ...]],
    vectors: Mapping[tuple[int, str], Vectors] = MappingProxyType({}),
) -> AdapterWeights:
    """Arrange matrices, each pair behind a gap as no bundle has, with vectors by layer and module."""
    parts: list[Tensor] = []
    placed = []
    first = 0
    for layer, module, a, b in rows:
        parts += [a.new_full((3,), torch.nan), a.reshape(-1), b.reshape(-1)]
        sizes = a.shape[0], a.shape[1], b.shape[0], first + 3
        own = vectors.get((layer, module))
        placed.append(Placed(layer, BY_NAME[module].id, *sizes, vectors=own))
        first += 3 + a.numel() + b.numel()
    return arrange(torch.cat(parts) if parts else torch.empty(0), placed, layers)
