"""All backends: adapters of experts, with ranks of their own for each, beside the base and each other."""

import random

import pytest
import torch
from torch import Tensor

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.backends.native_lora import NativeLora
from inference_service.engine.backends.operations import Operations
from inference_service.engine.backends.torch_lora import TorchLora
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.kernels.experts import Routed, segments as of_pairs
from inference_service.engine.kernels.sgmv import SegmentCapacity
from inference_service.engine.lora.segments import Arrangement, Segment
from inference_service.engine.lora.weights import AdapterWeights, Placed, arrange
from inference_service.startup.merged import hold
from loramux_shared.bases.groups import EXPERTS_DOWN, EXPERTS_GATE_UP, expert_groups, group_of, layer_groups
from loramux_shared.bundle.modules import BY_NAME

NUM, TOP_K, LAYERS = 6, 2, 2
EXPERTS = expert_groups(NUM, 48, 40)
GROUPS = (*layer_groups(hidden=48, intermediate=80, q=48, kv=16), *EXPERTS)


def adapter(seed: int, ranks: tuple[int, ...]) -> AdapterWeights:
    """An adapter of expert modules in the second layer, each with a random one of the ranks."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    rows, first = [], 0
    for group in EXPERTS:
        for module, out in zip(group.modules, group.out_features, strict=True):
            if rank := draw.choice(ranks):
                size = rank * (group.in_features + out)
                parts.append(torch.randn(size, generator=generator) * 0.3)
                place = Placed(1, BY_NAME[module].id, rank, group.in_features, out, first, group.expert)
                rows.append(place)
                first += size
    return arrange(torch.cat(parts), rows, (GROUPS,) * LAYERS)


Owners = list[list[tuple[AdapterWeights, float]]]
"""The adapters of each row, with their scales."""


def added(x: Tensor, experts: list[int], owners: Owners, name: str) -> Tensor:
    """Return the part that adapters add to rows [P, in], each of one expert, in float64."""
    rows = []
    for row, expert, parts in zip(x.double(), experts, owners, strict=True):
        (shape,) = (group for group in EXPERTS if group.name == group_of(name, expert))
        slices = [torch.zeros(out, dtype=torch.float64) for out in shape.out_features]
        for owner, scale in parts:
            group = owner.layers[1].get(shape.name)
            for index, (a, b) in enumerate(zip(group.a, group.b, strict=True) if group else ()):
                if a is not None and b is not None:
                    slices[index] += scale * (row @ a.double().t() @ b.double())
        rows.append(torch.cat(slices))
    return torch.stack(rows)


@pytest.fixture(params=["native", "torch", "triton"])
def backend(request: pytest.FixtureRequest, device: str) -> tuple[LoraBackend, Operations, str]:
    """Each backend, the operations that sort pairs for it, and the device."""
    if request.param == "triton":
        types = torch.float32, torch.device(device)
        return TritonLora(GROUPS, LAYERS, *types), TritonOperations([], *types), device
    types = torch.float32, torch.device("cpu")
    if request.param == "torch":
        return TorchLora(GROUPS, *types), Operations(*types), "cpu"
    ops = CpuOps(request.getfixturevalue("compiled"), torch.float32)
    return NativeLora(ops, GROUPS, LAYERS), Operations(*types), "cpu"


@pytest.mark.parametrize(
    ("lengths", "mixes"),
    [((3, 1, 2), False), ((2, 20, 1), False), ((2, 20, 1), True)],
    ids=["short", "long", "mixed"],
)
def test_each_pair_gets_what_its_adapters_have_for_its_expert(
    backend: tuple[LoraBackend, Operations, str], lengths: tuple[int, int, int], mixes: bool
) -> None:
    """Rows of base, adapters, mixtures and padding in one expert's tile; other layers get nothing."""
    lora, operations, device = backend
    held = [adapter(0, (0, 3, 8)), adapter(1, (0, 0, 1)), adapter(2, (5, 16))]
    hold(lora, *held)
    segments, start = [], 2
    for slot, length in zip((2, 0, 1), lengths, strict=True):
        segments.append(Segment(slot, start, start + length))
        start += length
    parts = [{2: 0.5, 0: -1.5}, {0: 0.5, 1: 1.5, 2: 2.5}] if mixes else []
    mixed = []
    for scales in parts:
        mixed += [Segment(slot, start, start + 2, scale) for slot, scale in scales.items()]
        start += 2
    lora.begin(Arrangement((), tuple(segments), tuple(mixed)))
    owners: Owners = [[] for _ in range(start + 3)]
    for segment in (*segments, *mixed):
        for row in range(segment.start, segment.end):
            owners[row].append((held[segment.slot], segment.scale))
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(len(owners), NUM, generator=generator).topk(TOP_K).indices.to(device, torch.int32)
    pairs = operations.by_expert(Routed(ids, torch.ones_like(ids, dtype=torch.float32)), NUM)
    of_places = [owners[token] for token in pairs.tokens.tolist()]
    for name, width, columns in ((EXPERTS_GATE_UP, 48, 80), (EXPERTS_DOWN, 40, 48)):
        x, out = (torch.randn(len(of_places), size, generator=generator) for size in (width, columns))
        expected = out + added(x, pairs.experts.tolist(), of_places, name)
        found, untouched = out.to(device, copy=True), out.to(device, copy=True)
        lora.apply_experts(x.to(device), found, 1, name, pairs)
        torch.testing.assert_close(found.cpu(), expected.float(), rtol=1e-5, atol=1e-5)
        lora.apply_experts(x.to(device), untouched, 0, name, pairs)
        assert torch.equal(untouched.cpu(), out)


def test_programs_share_the_segments_of_many_pairs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each span's segments follow those of the spans before it, as one program would make them."""
    tokens, tile = 1300, 64
    ids = torch.rand(tokens, NUM).topk(TOP_K).indices.to(device, torch.int32)
    pairs = TritonOperations([], torch.float32, torch.device(device)).by_expert(
        Routed(ids, torch.ones(ids.shape, device=device)), NUM
    )
    owners = of_pairs.Owners(torch.randint(0, 3, (tokens,), dtype=torch.int32, device=device), None)
    made = []
    for span in (4096, 1024):
        monkeypatch.setattr(of_pairs, "SPAN", span)
        capacity = SegmentCapacity(len(pairs.tokens), 10**6, tile)
        each = of_pairs.PairSegments.allocate(capacity, torch.device(device))
        each.segments.packed.fill_(-1)
        for launch in each.fill(pairs, owners, slot_stride=10, expert_stride=1):
            launch()
        made.append(each.segments)
    assert torch.equal(made[0].packed, made[1].packed)
    starts, last = made[1].seg_start.tolist(), int(made[1].pass_start[1])
    numbers = owners.slots[pairs.tokens.long()] * 10 + pairs.experts
    expected = [p for p in range(len(numbers)) if p % tile == 0 or numbers[p] != numbers[p - 1]]
    assert starts[: last + 1] == [*expected, len(numbers)]
    assert made[1].seg_slot[:last].tolist() == numbers[expected].tolist()
