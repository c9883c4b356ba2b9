"""Random adapters for a small model, their updates in float64, and a bank for them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.lora.places import Places
from inference_service.engine.lora.segments import Arrangement, Segment
from inference_service.engine.lora.weights import AdapterWeights, Vectors
from loramux_shared.bases.groups import layer_groups
from tests.support.weights import adapter_of

GROUPS = layer_groups(hidden=48, intermediate=80, q=48, kv=16)
LAYERS = 2
DIMS = {
    module: (shape.in_features, out)
    for shape in GROUPS
    for module, out in zip(shape.modules, shape.out_features, strict=True)
}
ADAPTERS: list[Mapping[str, int]] = [
    {"attn_q": 8, "attn_v": 8},
    dict.fromkeys(DIMS, 4) | {"attn_q": 12, "mlp_gate": 2},
    {"attn_dense": 5, "mlp_4h_to_h": 16},
    {"mlp_h_to_4h": 3},
    {"attn_k": 1, "mlp_4h_to_h": 7},
]
"""The ranks of the modules."""
MAX_RANK = 16


def adapter(
    ranks: Mapping[str, int], seed: int, layers: Sequence[int] = range(LAYERS), affine: Sequence[str] = ()
) -> AdapterWeights:
    """A random adapter, some of whose modules have vectors, with a rank or without."""
    ranks = dict.fromkeys(affine, 0) | ranks
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (
            layer,
            module,
            torch.randn(rank, DIMS[module][0], generator=generator) * 0.3,
            torch.randn(DIMS[module][1], rank, generator=generator) * 0.3,
        )
        for layer in layers
        for module, rank in ranks.items()
    ]
    vectors = {
        (layer, module): Vectors(*torch.randn(2, DIMS[module][1], generator=generator))
        for layer in layers
        for module in affine
    }
    return adapter_of(rows, (GROUPS,) * LAYERS, vectors)


Mixtures = Sequence[tuple[Mapping[int, float], int]]
"""Scales by slot, and rows."""


def arrangement(lengths: Mapping[int, int], base: int = 2, mixtures: Mixtures = ()) -> Arrangement:
    """Return so many rows of each slot behind rows of the base, then of blends."""
    segments, mixed, start = [], [], base
    for slot, length in lengths.items():
        segments.append(Segment(slot, start, start + length))
        start += length
    for scales, length in mixtures:
        mixed += [Segment(slot, start, start + length, scale) for slot, scale in scales.items()]
        start += length
    return Arrangement((), tuple(segments), tuple(mixed))


def adapted(
    x: Tensor, out: Tensor, step: Arrangement, held: Mapping[int, AdapterWeights], layer: int, name: str
) -> Tensor:
    """Return a linear's output with the adapters in their slots, in float64."""
    (shape,) = (shape for shape in GROUPS if shape.name == name)
    out = out.double()
    for segment in step.segments:
        group = held[segment.slot].layers[layer].get(name)
        rows = slice(segment.start, segment.end)
        for index, (first, size) in enumerate(zip(shape.out_offsets, shape.out_features, strict=True)):
            if group is not None and group.a[index] is not None:
                product = x[rows].double() @ group.a[index].double().t() @ group.b[index].double()
                out[rows, first : first + size] += segment.scale * product
            if group is not None and (vectors := group.vectors[index]) is not None:
                out[rows, first : first + size] *= vectors.c.double()
                out[rows, first : first + size] += vectors.d.double()
    return out


def expect_right(
    lora: LoraBackend, step: Arrangement, held: Mapping[int, AdapterWeights], device: str = "cpu"
) -> None:
    """Check that each row gets the update of the adapter in its slot, and rows of the base get none."""
    lora.begin(step)
    for layer in range(LAYERS):
        for shape in GROUPS:
            x = torch.randn(step.segments[-1].end + 1, shape.in_features)
            out = torch.randn(len(x), sum(shape.out_features))
            found = out.to(device, copy=True)
            lora.apply(x.to(device), found, layer, shape.name)
            expected = adapted(x, out, step, held, layer, shape.name)
            torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-5, atol=1e-5)
            assert torch.equal(found[:2].cpu(), out[:2])


class Resident:
    """A bank with its adapters, kept as its owner would."""

    def __init__(self, lora: LoraBackend, num_bytes: int, num_slots: int) -> None:
        lora.open(num_bytes, MAX_RANK, num_slots)
        self.lora = lora
        self.places = Places(num_bytes)
        self.held: dict[int, AdapterWeights] = {}
        self._clock = 0
        self._used: dict[int, int] = {}

    def bring(self, weights: AdapterWeights) -> int:
        """Bring an adapter in; those that were used longest ago leave for it. Return its slot."""
        packed = self.lora.pack(weights)
        if len(self.held) == self.lora.num_slots:
            self.send_away(min(self.held, key=self._used.__getitem__))
        place = self.places.find(packed.num_bytes, self._used.__getitem__)
        for slot in place.leaving:
            self.send_away(slot)
        slot = min(set(range(self.lora.num_slots)) - self.held.keys())
        self.places.take(slot, place.offset, packed.num_bytes)
        self.lora.copy(packed, place.offset)
        self.lora.enter(slot, place.offset, packed)
        self.held[slot] = weights
        self._clock += 1
        self._used[slot] = self._clock
        return slot

    def send_away(self, slot: int) -> None:
        self.lora.leave(slot)
        self.places.give_back(slot)
        del self.held[slot]
