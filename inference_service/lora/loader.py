"""From a verified bundle to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from inference_service.lora.vocabulary import Factors, OwnTable, Vocabulary
from inference_service.lora.weights import AdapterWeights, Placed, Vectors, arrange
from loramux_shared.bases.groups import GroupShape
from loramux_shared.bundle.manifest import ModuleRow
from loramux_shared.bundle.npy import Array
from loramux_shared.bundle.reader import Bundle
from loramux_shared.deployment import Dtype


def load_adapter(
    bundle: Bundle, layers: Sequence[tuple[GroupShape, ...]], dtype: torch.dtype, device: torch.device
) -> AdapterWeights:
    """Return a bundle's matrices for layers with these groups, in a type and on a device.

    What is of both already is not copied.

    Raises:
        BundleCorrupt: it has rows that the base has no place for.
    """
    table, width = _tensor(bundle.table, bundle.manifest.dtype), bundle.table.shape[1]
    rows = (
        Placed(
            row.layer, row.module_id, row.rank, row.in_features, row.out_features, index * width, row.expert,
            _vectors(row, table[index], device) if row.vectors else None,
        )
        for index, row in enumerate(bundle.manifest.layer_rows)
    )  # fmt: skip
    weights = arrange(values_of(bundle, dtype, device), rows, layers)
    own = bundle.vocabulary is not None or bundle.manifest.vocab is not None
    return replace(weights, vocabulary=_vocabulary(bundle, device)) if own else weights


def values_of(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what `AdapterWeights.values` is of a bundle: its rows of layers [elements]."""
    return _tensor(bundle.table, bundle.manifest.dtype).to(device, dtype).view(-1)


def _vocabulary(bundle: Bundle, device: torch.device) -> Vocabulary:
    """Return what is of no layer; it is made into another type when it is packed."""
    values, size = bundle.vocabulary, bundle.manifest.vocab
    if values is None:
        return Vocabulary(size=size)
    flat, at = _tensor(values, bundle.manifest.dtype).to(device), 0
    factors: dict[str, Factors] = {}
    for row in bundle.manifest.vocabulary_rows:
        split = at + row.rank * row.in_features
        a, b = flat[at:split].view(row.rank, -1), flat[split : at + row.elements].view(-1, row.rank)
        factors[row.module] = Factors(a.t() if row.module == "embedding" else a, b)
        at += row.elements
    replaced: dict[str, tuple[Tensor, Tensor]] = {}
    for part in bundle.manifest.replaced:
        tokens = [torch.arange(first, first + count) for first, count in part.tokens]
        rows = flat[at : at + part.elements].view(part.count, part.features)
        replaced[part.module] = rows, torch.cat(tokens).to(device, torch.int32)
        at += part.elements
    embedding, head = (
        OwnTable(factors.get(module), *replaced.get(module, (None, None))) for module in ("embedding", "head")
    )
    return Vocabulary(embedding, head, size)


def _vectors(row: ModuleRow, values: Tensor, device: torch.device) -> Vectors:
    """Return those of a row in float32, from the type in which they are stored."""
    first, out = row.elements - row.vectors * row.out_features, row.out_features
    own = values[first : row.elements].to(device, torch.float32).view(row.vectors, out)
    c = own[0] + own[2] if row.vectors > 2 else own[0]
    return Vectors(c, own[1] if row.vectors > 1 else torch.zeros_like(c))


def _tensor(array: Array, dtype: Dtype) -> Tensor:
    if dtype is Dtype.BFLOAT16:  # torch knows no numpy bfloat16: pass the bits
        return _shared(array.view(np.int16)).view(torch.bfloat16)
    return _shared(array)


def _shared(array: Array) -> Tensor:
    try:
        return torch.utils.dlpack.from_dlpack(array)
    except BufferError:  # numpy before 2.1 does not lend what may only be read
        return torch.from_numpy(array.copy())
