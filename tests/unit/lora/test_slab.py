"""Locked host memory: taken once, in pieces that return."""

import gc
import random

import pytest
import torch

from inference_service.engine.lora.slab import ALIGNMENT, Slab
from loramux_shared.faults import ResourcesExhausted


def slab(pages: int) -> Slab:
    return Slab(pages * ALIGNMENT, lambda _address, _num_bytes: 0)


def test_pieces_do_not_overlap_and_all_return() -> None:
    """Tensors of many sizes keep their values; after the last is freed, the memory is one piece again."""
    memory, draw, held = slab(40), random.Random(0), dict[int, torch.Tensor]()
    for turn in range(300):
        if len(held) > 5:
            del held[draw.choice(sorted(held))]
        held[turn] = memory.empty(draw.randint(1, 8 * ALIGNMENT // 4), torch.float32).fill_(turn)
        assert all((tensor == number).all() for number, tensor in held.items())
    held.clear()
    gc.collect()
    assert memory.free_bytes == 40 * ALIGNMENT
    whole = memory.empty(40 * ALIGNMENT, torch.uint8)
    assert (len(whole), memory.free_bytes) == (40 * ALIGNMENT, 0)


def test_a_piece_is_held_by_any_view_of_it() -> None:
    """The memory of a tensor returns behind the last view, and not before."""
    memory = slab(2)
    view = memory.empty(ALIGNMENT, torch.bfloat16)[5:9]
    assert memory.free_bytes == 0
    del view
    assert memory.free_bytes == 2 * ALIGNMENT


def test_what_has_no_room_is_in_other_memory() -> None:
    """An adapter is packed all the same, and its end gives nothing back."""
    memory = slab(2)
    first, second = (memory.empty(2 * ALIGNMENT, torch.uint8) for _ in range(2))
    assert len(first) == len(second)
    del second
    assert memory.free_bytes == 0


def test_a_refusal_to_lock_names_the_setting() -> None:
    """The start ends with the setting to lower, and CUDA's number."""
    with pytest.raises(ResourcesExhausted, match=r"8,192 bytes .* error 2\)\. Lower LORAMUX_ADAPTER_HOST_GB"):
        Slab(5000, lambda _address, _num_bytes: 2)
