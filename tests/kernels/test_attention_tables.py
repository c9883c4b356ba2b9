"""The packing of a step's tables: pure numpy."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inference_service.kernels.attention import AttentionCapacity, AttentionTables, Context, pack_tables

BLOCK_SIZE = 16


@st.composite
def steps(draw: st.DrawFn) -> tuple[AttentionCapacity, list[Context]]:
    """Chunks between padding rows, and a capacity that holds them, often barely."""
    lengths = draw(st.lists(st.one_of(st.just(1), st.integers(2, 40)), max_size=6))
    contexts, row = [], 0
    for length in lengths:
        row += draw(st.integers(0, 2))
        end = length + draw(st.integers(0, 50))
        blocks = draw(st.lists(st.integers(0, 99), min_size=6, max_size=6, unique=True))
        contexts.append(Context(row, length, blocks, end))
        row += length
    spare = draw(st.integers(0, 2))
    return AttentionCapacity(
        max(1, row + spare), max(1, len(lengths) + spare), 6, BLOCK_SIZE, tile=draw(st.integers(1, 20))
    ), contexts


@given(step=steps())
def test_tables_say_where_every_row_is_and_what_it_sees(step: tuple[AttentionCapacity, list[Context]]) -> None:
    """Rows of chunks go where their blocks are, padding nowhere; tiles cover longer chunks exactly once."""
    capacity, contexts = step
    tables = AttentionTables.allocate(capacity, "cpu")
    tables.load(torch.from_numpy(pack_tables(capacity, contexts)))

    expected = [-1] * capacity.rows
    covered: dict[int, list[int]] = {}
    for chunk, first in tables.tiles.tolist():
        if chunk >= 0:
            covered.setdefault(chunk, []).append(first)
    for index, context in enumerate(contexts):
        for place in range(context.length):
            block, within = divmod(context.end - context.length + place, BLOCK_SIZE)
            expected[context.row + place] = context.blocks[block] * BLOCK_SIZE + within
        row, length, end, first = tables.chunks[index].tolist()
        assert (row, length, end) == (context.row, context.length, context.end)
        used = -(-end // BLOCK_SIZE)
        assert tables.blocks[first : first + used].tolist() == list(context.blocks[:used])
        tiles = sorted(covered.pop(index, []))
        assert tiles == ([] if length == 1 else [*range(0, length, capacity.tile)])
    assert covered == {}
    assert tables.cache_rows.tolist() == expected
    assert not tables.chunks[len(contexts) :].any()


def test_tiles_with_most_to_see_come_first() -> None:
    """The longest programs start first, so that none is left alone at the end."""
    capacity = AttentionCapacity(rows=60, chunks=2, blocks_per_chunk=8, block_size=16, tile=16)
    tables = AttentionTables.allocate(capacity, "cpu")
    contexts = [Context(0, 20, [0, 1], 20), Context(20, 40, range(8), 120)]
    tables.load(torch.from_numpy(pack_tables(capacity, contexts)))
    assert tables.tiles.tolist() == [[1, 32], [1, 16], [1, 0], [0, 16], [0, 0]]


def test_only_blocks_in_use_are_copied() -> None:
    """What a step copies grows with its contexts, not with the longest possible."""
    capacity = AttentionCapacity(rows=8, chunks=8, blocks_per_chunk=8192, block_size=16)
    assert len(pack_tables(capacity, [Context(0, 1, [3, 4], 20)])) == 8 + 4 * 8 + 2


def test_arrays_begin_at_multiples_of_16_bytes() -> None:
    """The one buffer of a step holds its arrays aligned, as the kernels were specialised."""
    capacity = AttentionCapacity(rows=7, chunks=3, blocks_per_chunk=5, block_size=16, tile=5)
    assert [where.start % 4 for where in capacity.sections.values()] == [0, 0, 0, 0]
    assert capacity.sections["blocks"].stop == capacity.packed_size


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([Context(0, 1, [0], 1)] * 3, "3 chunks, but room for 2"),
        ([Context(6, 3, [0], 3)], "rows up to 9, but room for 8"),
        ([Context(0, 1, [0, 1, 2, 3], 50)], "a context of 4 blocks, but room for 3"),
        ([Context(0, 1, [0, 1], 33)], "33 tokens need 3 blocks, got 2"),
        ([Context(0, 5, [0], 4)], "a chunk lies in its context"),
    ],
)
def test_a_step_beyond_the_capacity_is_refused(contexts: list[Context], message: str) -> None:
    """Nothing is dropped silently: not chunks, not rows, not the past."""
    capacity = AttentionCapacity(rows=8, chunks=2, blocks_per_chunk=3, block_size=16, tile=4)
    with pytest.raises(ValueError, match=message):
        pack_tables(capacity, contexts)


def test_longer_chunks_need_room() -> None:
    """A graph of decodes does not take a prompt."""
    with pytest.raises(ValueError, match="a chunk of 2 rows, but room for decoding alone"):
        pack_tables(AttentionCapacity(8, 2, 3, 16), [Context(0, 2, [0], 2)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_size": 24}, "power of two from 16 on, got 24"),
        ({"block_size": 8}, "power of two from 16 on, got 8"),
        ({"rows": 0}, "must be positive"),
        ({"tile": 0}, "must be positive"),
    ],
)
def test_capacities_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    """Blocks that kernels cannot divide by are refused when tables are planned."""
    with pytest.raises(ValueError, match=message):
        AttentionCapacity(**({"rows": 1, "chunks": 1, "blocks_per_chunk": 1, "block_size": 16} | changed))
