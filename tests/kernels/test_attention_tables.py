"""The packing of a step's tables: pure numpy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from inference_service.engine.kernels.attention import AttentionCapacity, AttentionTables, Context, pack_tables
from inference_service.engine.kernels.attention.balance import SPAN_STEP
from inference_service.engine.kernels.attention.tuning import DECODE_BALANCE, PREFILL_BALANCE
from tests.support.cases import cases

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


def loaded(capacity: AttentionCapacity, contexts: list[Context]) -> AttentionTables:
    """The tables of a step, in a buffer that held something else."""
    tables = AttentionTables.allocate(capacity, "cpu")
    packed = np.full(capacity.packed_size, -77, dtype=np.int32)
    tables.load(torch.from_numpy(pack_tables(capacity, contexts, out=packed)))
    return tables


@given(step=steps())
def test_tables_say_where_every_row_is_and_what_it_sees(step: tuple[AttentionCapacity, list[Context]]) -> None:
    """Rows of chunks go where their blocks are, padding nowhere; items cover every row exactly once."""
    capacity, contexts = step
    tables = loaded(capacity, contexts)
    expected, seen = [-1] * capacity.rows, {}
    for context in contexts:
        for place in range(context.length):
            position = context.end - context.length + place
            block, within = divmod(position, BLOCK_SIZE)
            expected[context.row + place] = context.blocks[block] * BLOCK_SIZE + within
            seen[context.row + place] = position, list(context.blocks[: -(-context.end // BLOCK_SIZE)])
    assert tables.cache_rows.tolist() == expected
    for items, tile in ((tables.decodes, 1), (tables.prefills, capacity.tile)):
        for row, rows, at, first_block, piece, *_ in items.tolist():
            assert rows <= tile
            for place in range(rows if piece == 0 else 0):
                position, blocks = seen.pop(row + place)
                assert position == at + place
                assert tables.blocks[first_block : first_block + len(blocks)].tolist() == blocks
    assert seen == {}


@given(step=steps(), groups=st.integers(2, 3))
def test_groups_of_layers_have_blocks_of_their_own(
    step: tuple[AttentionCapacity, list[Context]], groups: int
) -> None:
    """Each group has the tables of a lone group, and only the used parts are copied."""
    alone, contexts = step
    tables = [
        tuple([block + 100 * group for block in context.blocks] for group in range(groups))
        for context in contexts
    ]
    own = [replace(context, tables=each) for context, each in zip(contexts, tables, strict=True)]
    capacity = replace(alone, groups=groups)
    packed = pack_tables(capacity, own)
    together = AttentionTables.allocate(capacity, "cpu")
    for part in capacity.used(packed):
        together.packed[part] = torch.from_numpy(packed[part])
    for group in range(groups):
        found = together.of(group)
        expected = loaded(alone, [replace(context, blocks=context.table(group), tables=()) for context in own])
        for name in ("cache_rows", "decodes", "prefills", "merges"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        num = sum(-(-context.end // BLOCK_SIZE) for context in contexts)
        assert torch.equal(found.blocks[:num], expected.blocks[:num])


@st.composite
def skewed(draw: st.DrawFn) -> tuple[AttentionCapacity, list[Context]]:
    """Short and long contexts in one step, of any number of heads; a capacity that holds them barely."""
    ends = draw(st.lists(st.one_of(st.integers(1, 200), st.integers(1, 20_000)), min_size=1, max_size=40))
    lengths = [draw(st.one_of(st.just(1), st.integers(1, min(end, 70)))) for end in ends]
    rows = [sum(lengths[:i]) for i in range(len(ends))]
    contexts = [
        Context(row, length, range(1250), end) for row, length, end in zip(rows, lengths, ends, strict=True)
    ]
    longest = -(-max(ends) // BLOCK_SIZE)
    kv, tile = draw(st.sampled_from([1, 2, 8, 300])), draw(st.integers(1, 40))
    return AttentionCapacity(sum(lengths), len(ends), longest, BLOCK_SIZE, tile, kv), contexts


@given(step=skewed())
def test_keys_are_shared_so_that_no_program_is_left_alone(
    step: tuple[AttentionCapacity, list[Context]],
) -> None:
    """No item has more keys than its share or a useless cut; any step has room; no row is shared."""
    capacity, contexts = step
    tables = loaded(capacity, contexts)
    slots: set[int] = set()
    merged = {row: (first, pieces) for row, first, pieces, _ in tables.merges.tolist() if pieces}
    for items, balance in ((tables.decodes, DECODE_BALANCE), (tables.prefills, PREFILL_BALANCE)):
        found = [item for item in items.tolist() if item[1]]
        keys = sum(at + rows for _, rows, at, _, piece, *_ in found if piece == 0)
        most = max(balance.min_span, keys // (-(-balance.programs // capacity.kv_heads)) + SPAN_STEP)
        assert all((at + rows) / pieces <= most for _, rows, at, _, _, pieces, *_ in found)
        order = [-((at + rows) // pieces) for _, rows, at, _, _, pieces, *_ in found]
        assert order == sorted(order)
        for row, rows, _, _, piece, pieces, partial, _ in found:
            for place in range(rows if pieces > 1 else 0):
                assert merged[row + place] == (partial + place * pieces, pieces)
                slots.add(partial + place * pieces + piece)
    assert len(slots) == sum(pieces for _, pieces in merged.values())
    assert slots <= set(range(capacity.partial_rows))


def test_memory_of_partial_results_has_a_bound() -> None:
    """The workspace grows with the programs that fill a GPU, not with contexts, and is 0 for short contexts."""
    sizes = [
        AttentionCapacity(2048, 256, blocks, 16, tile=32).workspace_bytes(32, 128)
        for blocks in (8, 64, 256, 8192)
    ]
    assert sizes[0] == 0
    assert sizes[2] == sizes[3] == 4 * 32 * 129 * (2 * 32 + 2 * 16 * 32)
    assert AttentionCapacity(8, 8, 8192, 16).workspace_bytes(32, 128) == 4 * 32 * 129 * 40


def test_arrays_begin_at_multiples_of_16_bytes() -> None:
    """The one buffer of a step holds its arrays aligned, as the kernels were specialised."""
    capacity = AttentionCapacity(rows=7, chunks=3, blocks_per_chunk=5, block_size=16, tile=5)
    assert [where.start % 4 for where in capacity.sections.values()] == [0, 0, 0, 0, 0]
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
    """A step above the capacity in chunks, rows or past is refused."""
    capacity = AttentionCapacity(rows=8, chunks=2, blocks_per_chunk=3, block_size=16, tile=4)
    with pytest.raises(ValueError, match=message):
        pack_tables(capacity, contexts)


def test_longer_chunks_need_room() -> None:
    """A graph of decodes does not take a prompt."""
    with pytest.raises(ValueError, match="a chunk of 2 rows, but room for decoding alone"):
        pack_tables(AttentionCapacity(8, 2, 3, 16), [Context(0, 2, [0], 2)])


@pytest.mark.parametrize(("changed", "message"), cases(__file__, "CAPACITIES"))
def test_capacities_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    """Blocks that kernels cannot divide by are refused when tables are planned."""
    with pytest.raises(ValueError, match=message):
        AttentionCapacity(**({"rows": 1, "chunks": 1, "blocks_per_chunk": 1, "block_size": 16} | changed))
