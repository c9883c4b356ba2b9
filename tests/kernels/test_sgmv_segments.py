"""The packing of segments and of tables: pure numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from inference_service.kernels.sgmv import Group, SegmentCapacity, Segments, Slices, pack_segments, pack_table
from tests.support.cases import cases


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 9), st.integers(-1, 4)), max_size=40, unique_by=lambda entry: entry
    ),
    tile=st.integers(1, 8),
)
def test_every_entry_is_in_one_segment_of_its_slot(entries: list[tuple[int, int]], tile: int) -> None:
    """Packing keeps every entry and its scale, cuts at the tile, and never puts a token twice in a pass."""
    tokens, slots = [token for token, _ in entries], [slot for _, slot in entries]
    capacity = SegmentCapacity(entries=40, slots=5, tile=tile, passes=5, scaled=True)
    segments = Segments.allocate(capacity, "cpu")
    scales = np.arange(len(entries)) + 0.5
    segments.load(torch.from_numpy(pack_segments(capacity, slots, token_ids=tokens, scales=scales)))

    found = []
    for index in range(capacity.passes):
        starts, owners = segments.seg_start.tolist(), segments.seg_slot.tolist()
        in_pass: list[int] = []
        for i in range(*segments.of_pass(index).tolist()):
            slot, members = owners[i], range(starts[i], starts[i + 1])
            assert 1 <= len(members) <= tile
            in_pass += segments.token_ids[list(members)].tolist()
            found += [(int(segments.token_ids[p]), slot, float(segments.scales[p])) for p in members]
        assert len(set(in_pass)) == len(in_pass)
    assert sorted(found) == sorted(
        (token, slot, float(scale)) for (token, slot), scale in zip(entries, scales, strict=True) if slot >= 0
    )


def test_arrays_begin_at_multiples_of_16_bytes() -> None:
    """The one buffer of a step holds its arrays aligned, as the kernels were specialised."""
    capacity = SegmentCapacity(entries=7, slots=3, tile=16, scaled=True)
    assert {where.start % 4 for where in capacity.sections.values()} == {0}
    assert capacity.sections["scales"].stop <= capacity.packed_size


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [
        ([0] * 9, None, "9 entries, but room for 8"),
        ([0, 3], None, "slot 3, but only 3 slots"),
        ([0, 1], [5, 5], "a token has 2 entries, but only 1 passes"),
        ([0, 1, 2], None, "3 different slots, but room for 2"),
    ],
)
def test_a_step_beyond_the_capacity_is_refused(slots: list[int], tokens: list[int], message: str) -> None:
    """A step above the capacity in entries, slots or adapters is refused, and so is a token in two segments."""
    with pytest.raises(ValueError, match=message):
        pack_segments(SegmentCapacity(entries=8, slots=3, tile=16, active=2), slots, token_ids=tokens)


def test_scales_need_room() -> None:
    """Scales that the device buffers cannot hold are refused, not ignored."""
    with pytest.raises(ValueError, match="no room"):
        pack_segments(SegmentCapacity(entries=8, slots=3, tile=16), [0], scales=[2.0])


def test_a_table_is_packed_without_gaps() -> None:
    """Slot by slot A of all slices, then B; rows of 9 elements and blocks of any begin at multiples of 16."""
    table = pack_table([(4, 0), (8, 2)], Slices.consecutive(32, 9), 9)
    assert table.tolist() == [[[4, 0, 64, 0], [0, 64, 192, 0]], [[8, 192, 352, 0], [2, 320, 608, 0]]]


@pytest.mark.parametrize(("entry", "message"), cases(__file__, "MISLEADING"))
def test_a_table_that_misleads_a_kernel_is_refused(entry: tuple[int, int, list[int]], message: str) -> None:
    """Kernels trust the table; the bank checks it once per load."""
    slices = Slices.consecutive(32, 16)
    table = pack_table([(4, 0), (8, 2)], slices, 8)
    group = Group(torch.empty(640), torch.from_numpy(table.copy()), slices, 8, max_rank=16, max_rows=16)
    group.check_table(table)
    slot, index, values = entry
    table[slot, index] = values
    with pytest.raises(ValueError, match=message):
        group.check_table(table)
