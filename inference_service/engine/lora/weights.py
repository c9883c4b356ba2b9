"""An adapter's matrices, from a verified bundle, arranged for the fused linears; exact ranks, no padding."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.lora.vocabulary import Factors, OwnTable, Vocabulary
from loramux_shared.bases.groups import GroupShape, distinct
from loramux_shared.bases.shard import Shard
from loramux_shared.bundle.manifest import Manifest, ModuleRow
from loramux_shared.bundle.modules import BY_ID, BY_NAME, BaseDims
from loramux_shared.bundle.npy import Array
from loramux_shared.bundle.reader import Bundle
from loramux_shared.deployment import Dtype
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
    """Expert of a mixture that has the module."""
    vectors: Vectors | None = None
    """Vectors that change its output."""


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
    """First value of A [rank, in]."""
    first_b: Numbers
    """First value of B [out, rank]."""
    groups: tuple[GroupShape, ...]
    vocabulary: Vocabulary | None = None
    """Changes outside of the layers."""
    vectors: Mapping[tuple[int, int], Vectors] = field(default_factory=dict)
    """Vectors by layer and module."""

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
    unplaced: list[Placed] = []
    vectors: dict[tuple[int, int], Vectors] = {}
    for row in rows:
        layer, module_id, rank, inside, outside, first, expert, own = row
        column = columns[layer].get((module_id, expert)) if layer < len(layers) else None
        if column is None:
            unplaced.append(row)
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
    if unplaced:
        raise BundleCorrupt(
            f"the bundle holds {len(unplaced)} rows that the base has no place for, for example layer "
            f"{unplaced[0].layer} {BY_ID[unplaced[0].module_id].name}; the base has {len(layers)} layers. "
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


def load_adapter(
    bundle: Bundle, layers: Sequence[tuple[GroupShape, ...]], dtype: torch.dtype, device: torch.device
) -> AdapterWeights:
    """Return a bundle's matrices for layers with these groups, in a type and on a device.

    What is of both already is not copied. Raise BundleCorrupt for rows that the base has no place for.
    """
    table, width = _tensor(bundle.table, bundle.manifest.dtype), bundle.table.shape[1]
    rows = (
        Placed(
            row.layer, row.module_id, row.rank, row.in_features, row.out_features, index * width, row.expert,
            _vectors(row, table[index], device) if row.vectors else None,
        )
        for index, row in enumerate(bundle.manifest.layer_rows)
    )  # fmt: skip
    weights = in_order(arrange(values_of(bundle, dtype, device), rows, layers))
    own = bundle.vocabulary is not None or bundle.manifest.vocab is not None
    return replace(weights, vocabulary=_vocabulary(bundle, device)) if own else weights


def in_order(weights: AdapterWeights) -> AdapterWeights:
    """Return a bundle's weights with their outputs in the order in which a decoder has them."""
    orders = [order for group in weights.groups for order in group.orders]
    if not any(orders):
        return weights
    vectors = dict(weights.vectors)
    for place, own in weights.vectors.items():
        if (order := orders[place[1]]) is not None:
            vectors[place] = Vectors(own.c[list(order)], own.d[list(order)])
    ordered = replace(weights, values=weights.values.clone(), vectors=vectors)
    shapes = {group.name: group for group in weights.groups}
    for groups in ordered.layers:
        for name, group in groups.items():
            for b, order in zip(group.b, shapes[name].orders, strict=True):
                if b is not None and order is not None:
                    b.copy_(b[:, list(order)])
    return ordered


def part_of(weights: AdapterWeights, shard: Shard) -> AdapterWeights:
    """Return what a rank adds of an adapter to the decoder that it computes, in memory of its own.

    Of a linear with a part of the outputs it has all of A and some rows of B, of one with a part of the inputs
    some columns of A and all of B: what is added is summed with what it is added to. The first rank has what
    counts once: d of such a sum, and what is outside of the layers.
    """
    whole = {group.name: group for group in weights.groups}
    rows: list[Placed] = []
    values: list[Tensor] = []
    first = 0
    for layer, groups in enumerate(weights.layers):
        for name, own in groups.items():
            shape, (inputs, outputs, widths, is_sum) = whole[name], shard.part(whole[name])
            for module, a, b, vectors, span, out in zip(
                shape.modules, own.a, own.b, own.vectors, outputs, widths, strict=True
            ):
                rank, inside = 0, inputs.stop - inputs.start
                if a is not None and b is not None:
                    rank = len(a)
                    values += [a[:, inputs].reshape(-1), b.t()[span].reshape(-1)]
                if vectors is not None:
                    once = not is_sum or shard.is_first
                    vectors = Vectors(vectors.c[span], vectors.d[span] * once)
                rows.append(Placed(layer, BY_NAME[module].id, rank, inside, out, first, shape.expert, vectors))
                first += rank * (inside + out)
    flat = torch.cat(values) if values else weights.values[:0]
    found = arrange(flat, [row for row in rows if row.rank or row.vectors], shard.config.layer_groups)
    return replace(found, vocabulary=weights.vocabulary if shard.is_first else None)


def values_of(bundle: Bundle, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what `AdapterWeights.values` is of a bundle: its rows of layers [elements]."""
    return _tensor(bundle.table, bundle.manifest.dtype).to(device, dtype).view(-1)


def check_vocabulary(manifest: Manifest, dims: BaseDims) -> None:
    """Raise BundleCorrupt where what is of no layer does not fit the base, or its tokens have no rows."""
    size, rows = manifest.vocab or dims.vocab, dims.vocab
    tables = [
        (part.module, part.tokens[-1][0] + part.tokens[-1][1], part.features) for part in manifest.replaced
    ]
    for row in manifest.vocabulary_rows:
        tokens, hidden = row.in_features, row.out_features
        if row.module == "head":
            tokens, hidden = hidden, tokens
        elif tokens < size:
            raise _unfit(f"{row.module}: expected factors for {size} tokens, found {tokens}")
        tables.append((row.module, tokens, hidden))
    for module, tokens, hidden in tables:
        if hidden != dims.hidden:
            raise _unfit(f"{module}: the base's rows have {dims.hidden} elements, the bundle's {hidden}")
        if tokens > max(size, dims.vocab):
            raise _unfit(f"{module}: expected rows of {max(size, dims.vocab)} tokens, found {tokens}")
        rows = max(rows, tokens)
    if size > rows:
        raise _unfit(f"vocab: expected rows for each of {size} tokens, found {rows}")


def _unfit(problem: str) -> BundleCorrupt:
    return BundleCorrupt(f"{problem}. Rebuild the deployment for this base.")


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
