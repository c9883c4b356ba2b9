"""The triton backend: adapters that come one after the other, and launches that outlive a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from inference_service.backends.torch import TorchLora
from inference_service.backends.triton import TritonLora
from inference_service.kernels.launch import Launch, intercepted
from inference_service.kernels.sgmv import DECODE_TILE, SegmentCapacity, Segments, pack_segments
from inference_service.lora.bank import GROWTH
from inference_service.lora.segments import Arrangement, Segment
from inference_service.lora.weights import AdapterWeights, Matrices, pack_adapter
from loramux_shared.bases.groups import layer_groups

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


def adapter(ranks: Mapping[str, int], seed: int, layers: Sequence[int] = range(LAYERS)) -> AdapterWeights:
    """A random adapter."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        Matrices(
            layer,
            module,
            torch.randn(rank, DIMS[module][0], generator=generator) * 0.3,
            torch.randn(DIMS[module][1], rank, generator=generator) * 0.3,
        )
        for layer in layers
        for module, rank in ranks.items()
    ]
    return pack_adapter(rows, GROUPS, LAYERS, torch.float32, torch.device("cpu"))


def arrangement(lengths: Mapping[int, int], base: int = 2) -> Arrangement:
    """So many rows of each slot, behind rows of the base."""
    segments, start = [], base
    for slot, length in lengths.items():
        segments.append(Segment(slot, start, start + length))
        start += length
    return Arrangement((), tuple(segments))


def expect_equal(ours: TritonLora, theirs: TorchLora, step: Arrangement, device: str) -> None:
    """Both backends add the same in every linear, and nothing to the base's rows."""
    ours.begin(step)
    theirs.begin(step)
    for layer in range(LAYERS):
        for shape in GROUPS:
            x = torch.randn(step.segments[-1].end + 1, shape.in_features)
            out = torch.randn(len(x), sum(shape.out_features))
            found, expected = out.to(device, copy=True), out.clone()
            ours.apply(x.to(device), found, layer, shape.name)
            theirs.apply(x, expected, layer, shape.name)
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(found[:2].cpu(), out[:2])


def test_adapters_may_be_loaded_between_steps(device: str) -> None:
    """One after the other, of other ranks and modules each time; those before stay what they were."""
    ours = TritonLora(GROUPS, torch.float32, torch.device(device))
    theirs = TorchLora(GROUPS, torch.device("cpu"))
    for slot, ranks in enumerate(ADAPTERS):
        weights = adapter(ranks, seed=slot, layers=[0] if slot == 3 else range(LAYERS))
        assert ours.load(weights) == theirs.load(weights) == slot
        lengths = dict.fromkeys(range(slot, -1, -1), 1) | {slot: 3}
        expect_equal(ours, theirs, arrangement(lengths), device)
    expect_equal(ours, theirs, arrangement({0: 20, 4: 1, 1: 17}), device)
    assert ours.num_slots == len(ADAPTERS)


def test_the_weights_are_not_kept(device: str) -> None:
    """An adapter is in the bank's memory alone, whose size is known: what it needs and room to grow."""
    lora = TritonLora(GROUPS, torch.float32, torch.device(device))
    assert lora.num_bytes == 0
    needed = 0
    for slot in range(6):
        weights = adapter(ADAPTERS[1], seed=slot)
        group = weights.layers[0]["qkv"]
        needed += sum(
            part.nbytes
            for layer in weights.layers
            for g in layer.values()
            for part in (g.a, *g.b)
            if part is not None
        )
        kept = weakref.ref(group)
        lora.load(weights)
        del weights, group
        gc.collect()
        assert kept() is None
        tables = LAYERS * sum(len(shape.modules) for shape in GROUPS) * 3 * 8 * 2 * (slot + 1)
        assert needed < lora.num_bytes <= needed * GROWTH + tables


def test_a_recorded_step_serves_more_adapters_at_replay(device: str) -> None:
    """Launches recorded with one adapter are right for any later step of their capacity, and count no segments.

    Elsewhere a grid frozen at the recording's number of segments dropped adapters silently.
    """
    lora = TritonLora(GROUPS, torch.float32, torch.device(device))
    theirs = TorchLora(GROUPS, torch.device("cpu"))
    for slot, ranks in enumerate(ADAPTERS):
        weights = adapter(ranks, seed=slot)
        lora.load(weights)
        theirs.load(weights)
    capacity = SegmentCapacity(8, lora.num_slots, DECODE_TILE)
    segments = Segments.allocate(capacity, device)
    inputs = {shape.name: torch.randn(8, shape.in_features, device=device) for shape in GROUPS}
    outputs = {shape.name: torch.zeros(8, sum(shape.out_features), device=device) for shape in GROUPS}

    fill(segments, [1])
    tape: list[Launch] = []
    with intercepted(tape.append):
        lora.use(segments)
        for shape in GROUPS:
            lora.apply(inputs[shape.name], outputs[shape.name], 1, shape.name)
    other = Segments.allocate(SegmentCapacity(2, lora.num_slots, DECODE_TILE), device)
    lora.use(other)  # another capacity comes between, with memory of its own

    for slots in ([0, 1, 2, 4], [1], [3, 3, 3, 0, 2, 2, 1, 4]):
        lengths = {slot: slots.count(slot) for slot in slots}
        fill(segments, [slot for slot, length in lengths.items() for _ in range(length)])
        theirs.begin(arrangement(lengths, base=0))
        for out in outputs.values():
            out.zero_()
        for launch in tape:
            launch()
        for shape in GROUPS:
            expected = torch.zeros(8, sum(shape.out_features))
            theirs.apply(inputs[shape.name].cpu(), expected, 1, shape.name)
            torch.testing.assert_close(outputs[shape.name].cpu(), expected, rtol=1e-5, atol=1e-5)


def fill(segments: Segments, slots: Sequence[int]) -> None:
    """Load a step whose row i has the adapter in slots[i]."""
    segments.load(torch.from_numpy(pack_segments(segments.capacity, np.array(slots))))


def test_the_launches_of_a_step_depend_on_its_capacity_alone(device: str) -> None:
    """Steps of other adapters, and of fewer rows than the capacity has, have the same grids."""
    lora = TritonLora(GROUPS, torch.float32, torch.device(device))
    for slot, ranks in enumerate(ADAPTERS):
        lora.load(adapter(ranks, seed=slot))
    x, out = torch.zeros(16, 48, device=device), torch.zeros(16, 80, device=device)
    seen = []
    for rows in ({0: 1}, {1: 15}, {3: 9}, dict.fromkeys(range(5), 1)):
        grids: list[tuple[int, ...]] = []
        with intercepted(lambda launch, grids=grids: grids.append(launch.grid)):
            lora.begin(arrangement(rows))
            lora.apply(x, out, 0, "qkv")
        seen.append(grids)
    assert seen[0] != []
    assert seen[:3] == [seen[0]] * 3
    assert seen[3] > seen[0]  # which has room for one adapter, whatever is loaded


def test_a_linear_that_no_adapter_touches_has_no_launch(device: str) -> None:
    """Its output is left alone."""
    lora = TritonLora(GROUPS, torch.float32, torch.device(device))
    lora.load(adapter({"attn_q": 2}, seed=0, layers=[1]))
    launched: list[Launch] = []
    x: Tensor = torch.zeros(4, 48, device=device)
    with intercepted(launched.append):
        lora.begin(arrangement({0: 1}))
        lora.apply(x, torch.zeros(4, 80, device=device), 0, "qkv")
        lora.apply(x, torch.zeros(4, 48, device=device), 1, "o")
    assert launched == []
