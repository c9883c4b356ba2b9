"""The triton backend: launches that outlive a step, and the adapters that it had."""

import gc
import random
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.kernels.launch import Launch, intercepted
from inference_service.engine.kernels.sgmv import DECODE_TILE, SegmentCapacity, Segments, pack_segments
from inference_service.startup.merged import hold
from tests.kernels.lora_case import ADAPTERS, GROUPS, LAYERS, Resident, adapted, adapter, arrangement

ROWS = 8


@pytest.fixture
def lora(device: str) -> TritonLora:
    """An empty bank."""
    return TritonLora(GROUPS, LAYERS, torch.float32, torch.device(device))


class Recorded:
    """The launches of all linears of a step of some rows, which is filled again and replayed."""

    def __init__(self, lora: TritonLora, device: str) -> None:
        self._segments = Segments.allocate(SegmentCapacity(ROWS, lora.num_slots, DECODE_TILE), device)
        self._linears = [(layer, shape.name) for layer in range(LAYERS) for shape in GROUPS]
        shapes = [shape for _ in range(LAYERS) for shape in GROUPS]
        self.inputs = [torch.randn(ROWS, shape.in_features, device=device) for shape in shapes]
        self.outputs = [torch.zeros(ROWS, sum(shape.out_features), device=device) for shape in shapes]
        self._tape: list[Launch] = []
        with intercepted(self._tape.append):
            lora.use(self._segments)
            for (layer, name), x, out in zip(self._linears, self.inputs, self.outputs, strict=True):
                lora.apply(x, out, layer, name)

    def replay(self, lengths: Mapping[int, int]) -> None:
        """Run the recorded step for so many rows of each slot."""
        slots = [slot for slot, length in lengths.items() for _ in range(length)]
        self._segments.load(torch.from_numpy(pack_segments(self._segments.capacity, np.array(slots))))
        for out in self.outputs:
            out.fill_(1.0)
        for launch in self._tape:
            launch()

    def expect_right(self, lengths: Mapping[int, int], bank: Resident) -> None:
        """Replay, and compare with the updates of the adapters in their slots."""
        self.replay(lengths)
        step = arrangement(lengths, base=0)
        for (layer, name), x, out in zip(self._linears, self.inputs, self.outputs, strict=True):
            expected = adapted(x.cpu(), torch.ones_like(out).cpu(), step, bank.held, layer, name).float()
            torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


def bank_of(lora: TritonLora, num_slots: int) -> Resident:
    """A bank with room for that many adapters on all modules."""
    return Resident(lora, num_slots * lora.pack(adapter(ADAPTERS[1], 0)).num_bytes, num_slots)


def test_a_step_recorded_in_an_empty_bank_serves_later_adapters(lora: TritonLora, device: str) -> None:
    """Launches recorded in an empty bank are right for the slots, ranks and linears at a replay."""
    bank = bank_of(lora, 4)
    recorded = Recorded(lora, device)
    draw = random.Random(1)
    for seed in range(8):
        affine = ("attn_k", "mlp_4h_to_h")[: seed % 3]
        bank.bring(adapter(ADAPTERS[seed % len(ADAPTERS)], seed, affine=affine))
        slots = draw.sample(sorted(bank.held), draw.randint(1, min(3, len(bank.held))))
        recorded.expect_right({slot: draw.randint(1, 2) for slot in slots}, bank)
    assert len(bank.held) == 4


def test_a_recorded_step_with_a_slot_that_was_left_adds_nothing(lora: TritonLora, device: str) -> None:
    """A freed slot adds nothing in a recorded step, though the arena still has the bytes of its adapter."""
    bank = bank_of(lora, 3)
    recorded = Recorded(lora, device)
    gone, stays = bank.bring(adapter(ADAPTERS[1], 0)), bank.bring(adapter(ADAPTERS[1], 1))
    recorded.replay({gone: 2, stays: 1})
    assert all((out[:3] != 1).any() for out in recorded.outputs)
    bank.send_away(gone)
    recorded.replay({gone: 2, stays: 1, 2: 1})
    for out in recorded.outputs:
        assert (out[:2] == 1).all()
        assert (out[3:] == 1).all()
        assert (out[2] != 1).any()


def test_the_weights_are_not_kept(lora: TritonLora) -> None:
    """An adapter is copied into the bank's memory alone, and the memory keeps its size."""
    bank = bank_of(lora, 3)
    size = lora.num_bytes
    for seed in range(4):
        packed = lora.pack(adapter(ADAPTERS[1], seed))
        retained = weakref.ref(packed.matrices)
        offset = seed % 3 * packed.num_bytes
        if seed == 3:
            lora.leave(0)
        lora.copy(packed, offset)
        lora.enter(seed % 3, offset, packed)
        del packed
        gc.collect()
        assert retained() is None
        assert lora.num_bytes == size
    assert not bank.held


def test_a_linear_that_no_adapter_of_the_step_touches_has_no_launch(lora: TritonLora, device: str) -> None:
    """A linear without an adapter has no launch and keeps its output; a recorded step has a launch."""
    hold(lora, adapter({"attn_q": 2}, seed=0, layers=[1]))
    launched: list[Launch] = []
    x: Tensor = torch.zeros(4, 48, device=device)
    outs: Sequence[Tensor] = torch.zeros(4, 80, device=device), torch.zeros(4, 48, device=device)
    with intercepted(launched.append):
        lora.begin(arrangement({0: 1}))
        lora.apply(x, outs[0], 0, "qkv")
        lora.apply(x, outs[1], 1, "o")
        assert launched == []
        lora.apply(x, outs[0], 1, "qkv")
        assert len(launched) == 2
        lora.use(Segments.allocate(SegmentCapacity(4, 1, DECODE_TILE), device))
        lora.apply(x, outs[1], 1, "o")
    assert len(launched) == 4
