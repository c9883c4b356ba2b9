"""All backends: adapters come, leave and are replaced, in memory that never moves."""

import ctypes
import mmap
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.backends.native_lora import NativeLora
from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.lora.places import taken_by
from inference_service.startup.merged import hold
from loramux_shared.bases.groups import layer_groups
from loramux_shared.faults import InternalFault
from tests.kernels.lora_case import (
    ADAPTERS,
    GROUPS,
    LAYERS,
    MAX_RANK,
    Resident,
    adapter,
    arrangement,
    expect_right,
)
from tests.kernels.place import COMPILED
from tests.support.weights import adapter_of


def test_adapters_come_and_go_and_each_adds_what_it_is(lora: LoraBackend, device: str) -> None:
    """Ranks, modules, vectors and layers change and slots are reused; other adapters stay the same."""
    device = device if lora.name != "native" else "cpu"
    draw = random.Random(0)
    sizes = [taken_by(lora.pack(adapter(ranks, seed=0)).num_bytes) for ranks in ADAPTERS]
    bank = Resident(lora, max(sizes) + sum(sizes) // 3, num_slots=4)
    arena = lora.num_bytes
    seen = set()
    for seed in range(16):
        layers = [draw.randrange(LAYERS)] if seed % 5 == 4 else range(LAYERS)
        affine = ("attn_k", "mlp_gate", "mlp_4h_to_h")[: seed % 4]
        slot = bank.bring(adapter(draw.choice(ADAPTERS), seed, layers, affine))
        others = sorted(bank.held.keys() - {slot})
        expect_right(lora, arrangement(dict.fromkeys(others, 1) | {slot: 3}), bank.held, device)
        seen |= {slot}
    assert len(bank.held) > 1
    expect_right(lora, arrangement(dict.fromkeys(others, 1) | {slot: 20}), bank.held, device)
    assert seen == set(range(4))
    assert lora.num_bytes == arena


def test_rows_of_mixtures_get_the_scaled_sum(lora: LoraBackend, device: str) -> None:
    """Rows of blends of one to eight adapters, also of other modules, lie beside plain rows, long and short."""
    device = device if lora.name != "native" else "cpu"
    held = {slot: adapter(ADAPTERS[slot % 5], slot) for slot in range(8)}
    hold(lora, *held.values())
    eight = {slot: 0.25 * (slot - 3.5) for slot in held}
    mixtures = [({0: 0.5, 3: -2.0}, 20), (eight, 2), ({2: 1.5}, 3), ({4: 1.0, 2: 1.0, 1: 0.125}, 1)]
    expect_right(lora, arrangement({0: 1, 5: 2, 1: 17}, mixtures=mixtures), held, device)
    expect_right(lora, arrangement({}, mixtures=[({3: 0.5}, 2), ({0: 1.0, 3: 1.0}, 1)]), held, device)


@pytest.mark.parametrize("bad", [*(pytest.param(bad, marks=pytest.mark.sweep) for bad in (0, 2)), 4])
def test_an_adapter_that_overflows_reaches_no_row_of_others(lora: LoraBackend, device: str, bad: int) -> None:
    """Other rows have the same bits in short runs, long runs and blends, with and without an overflow."""
    device = device if lora.name != "native" else "cpu"
    steps = [
        arrangement(dict.fromkeys(range(5), 2), mixtures=[({bad: 0.5, 1: 2.0}, 3), ({3: 0.5, 1: 1.0}, 2)]),
        arrangement({0: 1, 1: 2, 2: 1, 3: 2, 4: 17}),
    ]
    torch.manual_seed(bad)
    provided = [
        (torch.randn(30, shape.in_features), torch.randn(30, sum(shape.out_features))) for shape in GROUPS
    ]
    every = [adapter(ranks, seed) for seed, ranks in enumerate(ADAPTERS)]
    bank = Resident(lora, sum(taken_by(lora.pack(each).num_bytes) for each in every), num_slots=5)
    for each in every:
        bank.bring(each)

    def rows_of_others() -> list[torch.Tensor]:
        found = []
        for step in steps:
            lora.begin(step)
            own = {row for each in step.segments if each.slot == bad for row in range(each.start, each.end)}
            for layer, (shape, (x, out)) in product(range(LAYERS), zip(GROUPS, provided, strict=True)):
                added = out.to(device, copy=True)
                with np.errstate(all="ignore"):  # of the interpreter, which would tell of it
                    lora.apply(x.to(device), added, layer, shape.name)
                found.append(added[[row for row in range(len(x)) if row not in own]])
        return found

    before = rows_of_others()
    bank.send_away(bad)
    assert bank.bring(replace(every[bad], values=every[bad].values * 1e38)) == bad
    assert all(torch.equal(one, other) for one, other in zip(rows_of_others(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_mixture_depends_on_no_other(compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
    """A row of a blend has the same bits alone, beside other blends, and beside plain rows."""
    lora = NativeLora(CpuOps(compiled, dtype), GROUPS, LAYERS)
    hold(lora, *(adapter(ADAPTERS[slot], slot) for slot in range(5)))
    scales, (shape, *_) = {4: 0.7, 1: -0.5, 0: 1.25}, GROUPS
    x, out = torch.randn(43, shape.in_features).to(dtype), torch.randn(43, sum(shape.out_features)).to(dtype)
    found = []
    for step in (
        arrangement({}, mixtures=[(scales, 1)]),
        arrangement({1: 1, 0: 19}, mixtures=[({1: 0.5, 0: 0.5}, 2), (scales, 19)]),
    ):
        rows = slice(43 - step.segments[-1].end, 43)
        lora.begin(step)
        added = out[rows].clone()
        lora.apply(x[rows].contiguous(), added, 0, shape.name)
        found.append(added[-1])
    assert torch.equal(*found)
    assert not torch.equal(found[0], out[-1])


def test_a_slot_that_changed_hands_is_the_new_ones(lora: LoraBackend, device: str) -> None:
    """The same slots in one step and the next, another adapter in one of them: nothing of the old is kept."""
    device = device if lora.name != "native" else "cpu"
    first, second, other = (adapter(ADAPTERS[1], seed) for seed in range(3))
    bank = Resident(lora, 3 * taken_by(lora.pack(first).num_bytes), num_slots=2)
    assert (bank.bring(first), bank.bring(other)) == (0, 1)
    step = arrangement({0: 1, 1: 1})
    expect_right(lora, step, bank.held, device)
    bank.send_away(0)
    assert bank.bring(second) == 0
    expect_right(lora, step, bank.held, device)


def test_nobody_gets_another_adapter_for_one_that_left(lora: LoraBackend) -> None:
    """A step with a slot that was left or never entered is an error that names the slot."""
    bank = Resident(lora, 2 * taken_by(lora.pack(adapter(ADAPTERS[1], 0)).num_bytes), num_slots=3)
    bank.bring(adapter(ADAPTERS[1], 0))
    bank.bring(adapter(ADAPTERS[1], 1))
    bank.send_away(0)
    for slot in (0, 2, 3, -1):
        with pytest.raises(InternalFault, match=f"rows of slot {slot}, which holds no adapter"):
            lora.begin(arrangement({slot: 1, 1: 1}))


REFUSED: dict[str, Callable[[LoraBackend], None]] = {
    "open already": lambda lora: lora.open(64, 1, 1),
    "slot 0 cannot be taken": lambda lora: lora.enter(0, 0, lora.pack(adapter(ADAPTERS[3], 0))),
    "slot 2 cannot be taken": lambda lora: lora.enter(2, 0, lora.pack(adapter(ADAPTERS[3], 0))),
    "rank 17 cannot enter": lambda lora: lora.enter(1, 0, lora.pack(adapter({"attn_k": 17}, 0, [1]))),
    "slot 1 holds no adapter": lambda lora: lora.leave(1),
    "cannot lie at 32 ": lambda lora: lora.copy(lora.pack(adapter(ADAPTERS[3], 0)), 32),
    "cannot lie at -64 ": lambda lora: lora.enter(1, -64, lora.pack(adapter(ADAPTERS[3], 0))),
    "must lie within them": lambda lora: lora.copy(lora.pack(adapter(ADAPTERS[1], 0)), 64 * 100),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_bank_cannot_do_is_refused(lora: LoraBackend, message: str) -> None:
    """A refused call writes nothing, so the resident adapter answers as before."""
    weights = adapter(ADAPTERS[3], 7)
    packed = lora.pack(weights)
    lora.open(64 * 100, MAX_RANK, 2)
    lora.copy(packed, 0)
    lora.enter(0, 0, packed)
    with pytest.raises(InternalFault, match=message):
        REFUSED[message](lora)
    if lora.name != "triton" or not COMPILED:
        expect_right(lora, arrangement({0: 2}), {0: weights})


def resident(address: int, num_bytes: int) -> int:
    """Return the bytes of a range of addresses that are in memory: a page's highest bit says so."""
    first, last = address // mmap.PAGESIZE, (address + num_bytes) // mmap.PAGESIZE
    pages = np.fromfile("/proc/self/pagemap", np.uint64, last - first + 1, offset=8 * first)
    return int((pages >> 63).sum()) * mmap.PAGESIZE


M_MMAP_MAX = -4
"""Option of mallopt, from malloc.h; glibc's own number is 65,536."""


@pytest.fixture
def much_freed() -> Iterator[None]:
    """An allocator that has freed a large array below one that stays, as at the end of a start."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    freed, stays = np.ones(100 << 20, np.uint8), np.ones(1 << 20, np.uint8)
    del freed
    yield
    mallopt(M_MMAP_MAX, 65_536)
    del stays


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
@pytest.mark.usefixtures("much_freed")
def test_native_memory_is_taken_when_it_is_touched(compiled: ctypes.CDLL) -> None:
    """An arena of gigabytes and slots by the thousand cost next to nothing until they are used."""
    lora = NativeLora(CpuOps(compiled, torch.float32), GROUPS, LAYERS)
    lora.open(4 << 30, 64, 50_000)
    packed = lora.pack(adapter(ADAPTERS[1], 0))
    lora.copy(packed, 3 << 30)
    lora.enter(49_999, 3 << 30, packed)
    assert 0 < resident(lora._arena.address, 4 << 30) < 16 << 20
    assert 0 < resident(lora._table.ctypes.data, lora._table.nbytes) < 16 << 20
    assert lora.num_bytes > 4 << 30


class Counting(CpuOps):
    """Counts products of adapters."""

    products = 0

    def lora(self, *args: object, **kwargs: object) -> None:
        """Count, and compute."""
        self.products += 1
        super().lora(*args, **kwargs)


def test_a_linear_that_no_adapter_of_the_step_touches_costs_no_call(compiled: ctypes.CDLL) -> None:
    """The linear costs no call, whatever else is in the bank."""
    ops = Counting(compiled, torch.float32)
    lora = NativeLora(ops, GROUPS, LAYERS)
    everything, one = adapter(ADAPTERS[1], 0), adapter({"attn_q": 2}, 1, layers=[1])
    hold(lora, everything, one)
    expect_right(lora, arrangement({1: 3}), {1: one})
    assert ops.products == 1
    expect_right(lora, arrangement({1: 3, 0: 1}), {0: everything, 1: one})
    assert ops.products == 1 + LAYERS * len(GROUPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_takes_rows_and_types_as_they_come(compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Dimensions of any size, odd ranks and another type are packed without a change of values."""
    groups = layer_groups(hidden=50, intermediate=33, q=50, kv=7)
    dims = {
        module: (shape.in_features, out)
        for shape in groups
        for module, out in zip(shape.modules, shape.out_features, strict=True)
    }
    rows = [
        (0, module, torch.randn(rank, inside).to(torch.bfloat16), torch.randn(out, rank).to(torch.bfloat16))
        for rank, (module, (inside, out)) in enumerate(dims.items(), 1)
    ]
    weights = adapter_of(rows, [groups])
    lora = NativeLora(CpuOps(compiled, dtype), groups, 1)
    hold(lora, weights)
    lora.begin(arrangement({0: 5}, base=0))
    for shape in groups:
        x = torch.randn(5, shape.in_features).to(dtype)
        out = torch.zeros(5, sum(shape.out_features), dtype=dtype)
        lora.apply(x, out, 0, shape.name)
        group = weights.layers[0][shape.name]
        pairs = zip(group.a, group.b, strict=True)
        expected = torch.cat([x.double() @ a.double().t() @ b.double() for a, b in pairs], dim=1)
        assert (out.double() - expected).norm() < (1e-5 if dtype is torch.float32 else 2e-2) * expected.norm()
