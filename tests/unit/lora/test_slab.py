"""Locked host memory: taken in parts, in pieces that return."""

import gc
import random
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from inference_service.engine.lora.slab import ALIGNMENT, PART_BYTES, Slab
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


class Locking:
    """A CUDA that locks the parts it is asked for until one is one too many, and notes their bytes."""

    def __init__(self, parts: int) -> None:
        self.sizes: list[int] = []
        self._parts = parts

    def __call__(self, address: int, num_bytes: int) -> int:
        assert address % ALIGNMENT == 0
        self.sizes.append(num_bytes)
        return 2 if len(self.sizes) > self._parts else 0


def test_memory_is_locked_as_adapters_come() -> None:
    """A start locks one part; more are locked when they are needed, never more than was planned."""
    locking = Locking(9)
    memory = Slab(4 * PART_BYTES, locking)
    assert locking.sizes == [PART_BYTES]
    held = [memory.empty(PART_BYTES // 4, torch.uint8) for _ in range(4)]
    assert locking.sizes == [PART_BYTES]
    piece = PART_BYTES // 3 // ALIGNMENT * ALIGNMENT
    held += [memory.empty(piece, torch.uint8) for _ in range(4)]
    assert locking.sizes == [PART_BYTES, 4 * piece]  # whole pieces: none is left at the end of a part
    held.append(memory.empty(PART_BYTES + 1, torch.uint8))
    assert locking.sizes[2:] == [PART_BYTES + ALIGNMENT]
    assert sum(locking.sizes) + memory.free_bytes == 4 * PART_BYTES
    memory.empty(2 * PART_BYTES, torch.uint8)
    assert len(locking.sizes) == 3
    held.clear()
    gc.collect()
    assert memory.free_bytes == 4 * PART_BYTES


def test_pieces_of_two_parts_are_not_joined() -> None:
    """CUDA copies from no two parts at once, though they may lie side by side."""
    memory = Slab(2 * PART_BYTES, Locking(9))
    held = [memory.empty(PART_BYTES, torch.uint8) for _ in range(2)]
    held.clear()
    gc.collect()
    assert memory.free_bytes == 2 * PART_BYTES
    larger = memory.empty(PART_BYTES + 1, torch.uint8)
    assert (len(larger), memory.free_bytes) == (PART_BYTES + 1, 2 * PART_BYTES)


def test_a_later_part_that_is_not_locked_is_reported_once() -> None:
    """Adapters lie in other memory from then on; what is locked stays in use."""
    locking = Locking(1)
    memory = Slab(4 * PART_BYTES, locking)
    with capture_logs() as logs:
        held = [memory.empty(PART_BYTES, torch.uint8) for _ in range(4)]
    assert len(locking.sizes) == 2
    assert [entry["setting"] for entry in logs] == ["LORAMUX_ADAPTER_HOST_GB"]
    held.clear()
    gc.collect()
    assert memory.free_bytes == PART_BYTES


def test_memory_is_private_and_no_childs() -> None:
    """A part is anonymous memory of this process: no shared mapping, and not of a forked child."""
    addresses: list[int] = []
    memory = Slab(4 * ALIGNMENT, lambda address, _: addresses.append(address) or 0)
    assert memory.free_bytes == 4 * ALIGNMENT
    text = Path("/proc/self/smaps").read_text()
    _, _, own = text.partition(f"{addresses[0]:x}-")
    assert own.split()[1] == "rw-p"
    flags = next(line for line in own.splitlines() if line.startswith("VmFlags:"))
    assert " dc" in flags


def test_memory_that_cannot_be_mapped_is_like_memory_that_cannot_be_locked() -> None:
    """A part beyond the address space is reported; torch has no other memory of that size either."""
    memory = Slab(1 << 60, Locking(9))
    with capture_logs() as logs, pytest.raises(RuntimeError, match="allocate"):
        memory.empty(1 << 58, torch.uint8)
    assert [entry["cuda_error"] for entry in logs] == [2]


def test_a_refusal_to_lock_names_the_setting() -> None:
    """The start ends with the setting to lower, and CUDA's number."""
    with pytest.raises(ResourcesExhausted, match=r"8,192 bytes .* error 2\)\. Lower LORAMUX_ADAPTER_HOST_GB"):
        Slab(5000, lambda _address, _num_bytes: 2)
