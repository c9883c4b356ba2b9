"""Cache blocks: held, free, and found again by their content."""

from __future__ import annotations

import itertools

from hypothesis import given, settings, strategies as st

from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.block_manager import BlockManager
from tests.support.examples import examples

_ids = itertools.count()


def _seq(tokens: list[int], uid: int = 0, salt: str = "") -> Sequence:
    adapter = Adapter(f"a{uid}") if uid else None  # of another load each time
    return Sequence(str(next(_ids)), list(tokens), SamplingParams(), adapter, cache_salt=salt)


def _compute(blocks: BlockManager, seq: Sequence) -> None:
    """Admit a sequence and pretend that a step computed all of it."""
    assert blocks.start(seq)
    seq.progress.num_computed = len(seq.progress.tokens)
    blocks.register(seq)


def test_a_known_prefix_is_shared_and_its_last_token_is_left_to_compute() -> None:
    """A second sequence reuses full blocks, but computes at least its last token."""
    blocks = BlockManager(8, 4)
    first = _seq([1, 2, 3, 4, 5, 6, 7, 8])
    _compute(blocks, first)
    second = _seq([1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.start(second)
    assert second.progress.num_computed == 4
    assert second.progress.blocks[:1] == first.progress.blocks[:1]
    longer = _seq([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert blocks.start(longer)
    assert longer.progress.num_computed == 8


def test_a_sequence_that_did_not_fit_is_tried_again_when_something_has_changed() -> None:
    """A sequence stays refused until blocks are released or its next prefix block becomes known."""
    blocks = BlockManager(6, 4)
    other, running = _seq(list(range(50, 58))), _seq(list(range(9)))
    for seq in (other, running):
        assert blocks.start(seq)
    head = _seq(list(range(20)))
    assert not blocks.still_refused(head)
    assert not blocks.start(head)
    assert not head.progress.blocks
    assert blocks.still_refused(head)
    assert not blocks.still_refused(_seq(list(range(20))))
    other.progress.num_computed = 8
    blocks.register(other)
    assert blocks.still_refused(head)
    running.progress.num_computed = 9
    blocks.register(running)
    assert not blocks.still_refused(head)
    assert not blocks.start(head)
    assert blocks.still_refused(head)
    blocks.release(other)
    assert not blocks.still_refused(head)


def test_prefix_hashes_outlast_a_preemption() -> None:
    """A preempted sequence finds its blocks again by the hashes that it kept, those of its answer included."""
    blocks = BlockManager(8, 4)
    seq = _seq(list(range(6)))
    _compute(blocks, seq)
    seq.progress.tokens += range(6, 13)
    assert blocks.grow(seq, 13)
    seq.progress.num_computed = 13
    blocks.register(seq)
    known = list(seq.progress.hashes)
    assert len(known) == 3
    blocks.release(seq)
    assert blocks.start(seq)
    assert (seq.progress.num_computed, seq.progress.hashes) == (12, known)


@settings(max_examples=examples(150), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(0, 2), min_size=1, max_size=14),
            st.integers(0, 1),
            st.sampled_from(["", "a", "b"]),
        ),
        max_size=40,
    )
)
def test_blocks_balance_and_contents_are_never_mixed(actions: list[tuple[int, list[int], int, str]]) -> None:
    """Every block is free or held after any admissions, growths and releases, and a shared block has the
    tokens, the adapter and the salt of all its sequences."""
    blocks = BlockManager(10, 4)
    held: list[Sequence] = []
    content: dict[int, tuple[int, str, tuple[int, ...]]] = {}
    for action, tokens, uid, salt in actions:
        if action == 0 and held:
            blocks.release(held.pop(0))
            continue
        seq = _seq(tokens, uid, salt)
        if not blocks.start(seq):
            continue
        for index in range(seq.progress.num_computed // 4):
            assert content[seq.progress.blocks[index]] == (uid, salt, tuple(tokens[: index * 4 + 4]))
        for index in range(seq.progress.num_computed // 4, len(tokens) // 4):
            content[seq.progress.blocks[index]] = (uid, salt, tuple(tokens[: index * 4 + 4]))
        seq.progress.num_computed = len(tokens)
        blocks.register(seq)
        held.append(seq)
        in_use = {block for other in held for block in other.progress.blocks}
        assert blocks.num_free == blocks.num_blocks - len(in_use)
    for seq in held:
        blocks.release(seq)
    assert blocks.num_free == blocks.num_blocks
