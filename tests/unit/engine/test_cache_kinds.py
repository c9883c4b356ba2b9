"""Cache blocks, found again by their content; by kind: of layers that see only so far, and carried states.

An engine one step ahead uses a token before it is known, and may draft: nothing changes but when one is seen.
"""

import itertools
import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import pytest
from hypothesis import example, given, settings, strategies as st

from inference_service.core.adapter import Adapter, activation
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import GONE, Batch, EndReason, Sequence, StepOutput, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending, lay_out
from inference_service.engine.kernels.attention import Context
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import BlockPool, StateSlots, prefix_key
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from loramux_shared.bases.cache import window_blocks
from tests.support.examples import examples

BLOCK = 4
TOKENS = 5
SEQS = 4
LONGEST = 64
INVOCATION = (1, 3)
HANDLES = [Adapter(f"{number:064x}", number, INVOCATION if number == 2 else ()) for number in range(3)]
"""The third acts from its invocation on."""
Windows = tuple[int | None, ...]
_ids = itertools.count()
_made: WeakValueDictionary[str, Sequence] = WeakValueDictionary()
"""Sequences by their ids, as long as a test or an engine holds them."""


@dataclass
class Device:
    """A runner whose layers read caches as attention and a recurrence do; tokens are checksums of them.

    A window of few tokens makes it a model that repeats itself.
    """

    depth: int
    windows: Windows
    stateful: bool
    caches: list[dict[int, tuple[int, int]]] = field(default_factory=lambda: [{}, {}, {}])
    states: dict[int, int] = field(default_factory=dict)
    drawn: dict[Sequence, int] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    lengths: list[dict[str, int]] = field(default_factory=list)
    """Rows of each sequence, by step."""
    broken: bool = False

    def submit(self, batch: Batch) -> Pending:
        """Copy states, write the rows' tokens, read the visible rows of the last ones."""
        for copies in batch.copies:
            self.states |= {to: self.states[source] for to, source in copies.items()}
        rows = lay_out(batch, self.drawn)
        provided = zip(rows.tokens, rows.sources, strict=True)
        tokens = [token if source < 0 else self.ids[source] for token, source in provided]
        seen = {}
        for chunk, context in zip(rows.arrangement.chunks, rows.contexts, strict=True):
            uid, start = chunk.seq.slot + 1, context.end - context.length
            assert context.end < min(LONGEST, chunk.seq.num_prompt + chunk.seq.sampling.max_tokens)
            own = tokens[context.row : context.row + context.length]
            for group, cache in zip(range(len(self.windows)), self.caches, strict=False):
                cache |= {_place(context, group, start + at): (token, uid) for at, token in enumerate(own)}
            if self.stateful:
                assert context.slot >= 0
                state = self.states[context.slot] if start else 0
                for token in own:
                    state = _next_state(state, token, uid)
                self.states[context.slot] = state
            seen[chunk.seq] = context, context.end - chunk.drafted
        ids = self.ids = []
        for seq, ahead in zip(rows.sampled, rows.ahead, strict=True):
            known = [*seq.progress.tokens, *batch.drafts.get(seq, [])[:ahead]]
            ids.append(self._draw(seen[seq][0], seen[seq][1] + ahead, known))
        self.drawn = {seq: place for place, seq in enumerate(rows.sampled)}
        self.lengths.append({chunk.seq.id: chunk.length for chunk in batch.chunks})
        broken = self.broken

        def wait() -> list[Token]:
            if broken:
                raise RuntimeError
            return [Token(token) for token in ids]

        return Pending(tuple(rows.sampled), wait, drafts=rows.drafts)

    def _draw(self, context: Context, end: int, known: list[int]) -> int:
        found = [
            tuple(self.caches[group][_place(context, group, at)] for at in _seen(end, window))
            for group, window in enumerate(self.windows)
        ]
        for window, content in zip(self.windows, found, strict=True):
            pairs = zip(content, known[_seen(end, window).start :], strict=False)
            assert all(token == expected for (token, _), expected in pairs)
        return _checksum(found, self.states[context.slot] if self.stateful else 0)


def _seen(end: int, window: int | None) -> range:
    return range(0 if window is None else max(0, end - window), end)


def _place(context: Context, group: int, position: int) -> int:
    block = context.table(group)[position // BLOCK]
    assert block != GONE
    return block * BLOCK + position % BLOCK


def _checksum(found: list[tuple[tuple[int, int], ...]], state: int) -> int:
    return zlib.crc32(repr((found, state)).encode()) % TOKENS


def _next_state(state: int, token: int, uid: int) -> int:
    return zlib.crc32(repr((state, token, uid)).encode())


def _expected(prompt, sampling: SamplingParams, uid: int, windows: Windows, stateful: bool) -> list[int]:
    tokens, state = list(prompt), 0
    calls = [at for at in range(len(prompt)) if tuple(prompt[at : at + 2]) == INVOCATION] if uid == 3 else [0]
    owners = [uid if calls and at >= calls[-1] else 0 for at in range(LONGEST)]
    for token, owner in zip(prompt, owners, strict=False):
        state = _next_state(state, token, owner)
    while len(tokens) < LONGEST and len(tokens) - len(prompt) < sampling.max_tokens:
        found = [tuple((tokens[at], owners[at]) for at in _seen(len(tokens), window)) for window in windows]
        tokens.append(_checksum(found, state if stateful else 0))
        state = _next_state(state, tokens[-1], owners[len(tokens) - 1])
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class Base:
    """The layers and the memory of an engine under test."""

    windows: Windows = (None,)
    snapshots: int | None = None
    """None: its layers carry no state."""
    blocks: int = 24
    sliding: int = 0
    """Blocks of layers with a window, beside those that one sequence needs."""
    rows: int = 16
    depth: int = 0
    prefix_cache: bool = True
    spacing: int = 2
    seqs: int = SEQS
    drafted: int = 0
    """Most tokens of a draft; with states nothing is drafted."""

    def engine(self, clock: Callable[[], float] = lambda: 0.0) -> tuple[Engine, Device, BlockManager]:
        sizes = [
            self.blocks if window is None else window_blocks(window, BLOCK, BLOCK) + self.sliding
            for window in self.windows
        ]
        states = None
        if self.snapshots is not None:
            spacing = self.spacing if self.prefix_cache and self.snapshots else None
            states = StateSlots(self.seqs + self.snapshots, BLOCK, spacing)
        manager = BlockManager(sizes, BLOCK, self.windows, states=states, prefix_cache=self.prefix_cache)
        device = Device(self.depth, self.windows, self.snapshots is not None)
        drafted = 0 if states is not None else self.drafted
        limits = SchedulerLimits(self.rows, self.seqs, 2, LONGEST, speculative_tokens=drafted)
        engine = Engine(device, limits, manager, Residents(), clock)
        return engine, device, manager


BASES = st.builds(
    Base,
    windows=st.sampled_from([(None,), (5,), (None, 6), (3, None), (9, None, 2), (1, 8), (1,), (2,)]),
    snapshots=st.sampled_from([None, 0, 1, 3, 9]),
    blocks=st.integers(16, 30),
    sliding=st.integers(0, 24),
    rows=st.sampled_from([2, 7, 16]),
    depth=st.integers(0, 1),
    prefix_cache=st.booleans(),
    spacing=st.integers(1, 4),
    drafted=st.sampled_from([0, 0, 1, 3, 9]),
)
REQUESTS = st.tuples(
    st.integers(1, 50),  # tokens of the prompt
    st.integers(1, 30),  # new tokens at most
    st.integers(0, 3),  # adapter
    st.sampled_from([frozenset(), frozenset({3}), frozenset({0, 1})]),  # stop tokens
    st.integers(0, 50),  # leading tokens that it shares with others
)


def _drain(engine: Engine, manager: BlockManager) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    for _ in range(2000):
        if engine.idle:
            return outputs
        outputs += engine.step()
        _expect_sound(engine, manager)
    raise AssertionError("the engine did not come to an end")


def _expect_sound(engine: Engine, manager: BlockManager) -> None:
    """Every block is free or held as often as tables have it; exactly those that later rows see are there."""
    found = engine.inspect()
    running, drafted = [_made[seq_id] for seq_id in found.running], found.draft_tokens
    for place, (group, use) in enumerate(zip(manager.groups, found.blocks, strict=True)):
        pool = group.pool
        held = Counter(block for seq in running for block in seq.progress.tables[place] if block != GONE)
        assert use.held == held
        assert pool.num_free == pool.num_blocks - len(held)
        for seq in running:
            known = min(seq.progress.num_computed, len(seq.progress.tokens))
            gone = [index for index, block in enumerate(seq.progress.tables[place]) if block == GONE]
            assert gone == list(range(len(gone)))
            least = group.first_seen(max(0, known - 1 - drafted) // BLOCK * BLOCK)  # known before the last step
            assert least <= len(gone) <= group.first_seen(known)
    if manager.states is not None and found.states is not None:
        slots = [seq.progress.state_slot for seq in running]
        others = [*found.states.free, *found.states.cached]
        assert sorted(slots + others) == list(range(manager.states.num_slots))


@settings(max_examples=examples(300), deadline=None)
@example(Base((1,), rows=7), [(8, 1, 1, frozenset(), 0), (1, 1, 1, frozenset(), 0), (9, 1, 0, frozenset(), 0)])
@given(BASES, st.lists(st.one_of(REQUESTS, st.just("step"), st.integers(0, 9)), min_size=1, max_size=30))
def test_every_answer_is_what_the_model_says(base: Base, actions: list[object]) -> None:
    """Answers equal those of the request alone, for all layers and any memory, with drafts or a step ahead."""
    engine, _, manager = base.engine()
    added: dict[str, tuple[list[int], SamplingParams, int]] = {}
    outputs: list[StepOutput] = []
    aborted: set[str] = set()
    common = [random.Random(0).randrange(TOKENS) for _ in range(50)]
    for action in actions:
        if action == "step":
            outputs += engine.step()
            _expect_sound(engine, manager)
        elif isinstance(action, int):
            ended = aborted | {output.seq_id for output in outputs if output.finish}
            for seq_id in [seq_id for seq_id in added if seq_id not in ended][action : action + 1]:
                engine.abort(seq_id)
                aborted.add(seq_id)
        elif isinstance(action, tuple):
            length, new, uid, stops, shared = action
            draw = random.Random(next(_ids))
            prompt = [*common[:shared], *(draw.randrange(TOKENS) for _ in range(length))][:length]
            sampling = SamplingParams(max_tokens=new, stop_token_ids=stops)
            seq = _sequence(prompt, sampling, uid)
            added[seq.id] = list(prompt), sampling, uid
            engine.add(seq)
    outputs += _drain(engine, manager)
    for seq_id, (prompt, sampling, uid) in added.items():
        mine = [output for output in outputs if output.seq_id == seq_id]
        answer = [output.token.id for output in mine if output.token]
        expected = _expected(prompt, sampling, uid, base.windows, base.snapshots is not None)
        assert answer == (expected[: len(answer)] if seq_id in aborted else expected)
        assert [output.first for output in mine] == [True, *[False] * (len(mine) - 1)][: len(mine)]
        assert sum(output.finish is not None for output in mine) == (seq_id not in aborted)
    assert all(group.pool.num_free == group.pool.num_blocks for group in manager.groups)
    assert not engine.inspect().drafting
    if manager.states is not None:
        assert manager.states.num_free == manager.states.num_slots


def _sequence(prompt: list[int], sampling: SamplingParams, uid: int) -> Sequence:
    adapter, invocation = activation(HANDLES[uid - 1] if uid else None, prompt)
    seq = Sequence(str(next(_ids)), prompt, sampling, adapter, invocation=invocation)
    _made[seq.id] = seq
    return seq


def _run(engine: Engine, manager: BlockManager, prompt: list[int], new: int = 1, uid: int = 0) -> Sequence:
    """Answer a request that is alone, and return it as it was at its end."""
    sampling = SamplingParams(max_tokens=new)
    seq = _sequence(list(prompt), sampling, uid)
    engine.add(seq)
    _drain(engine, manager)
    return seq


def test_a_prefix_is_found_where_a_window_can_still_see_what_it_needs() -> None:
    """A sliding layer needs the last blocks alone; without them a shorter prefix is found, or none."""
    engine, _, manager = Base((None, 6), blocks=30, sliding=4, rows=16).engine()
    prompt = list(range(41))
    assert _run(engine, manager, prompt).progress.num_cached == 0
    again = _run(engine, manager, prompt)
    assert again.progress.num_cached == 40
    _run(engine, manager, list(range(100, 140)))  # takes over the sliding blocks, of everything others are free
    keys = [manager.groups[1].knows(again, index) for index in range(10)]
    assert not all(keys)
    found = _run(engine, manager, prompt).progress.num_cached
    assert found < 40
    assert all(manager.groups[0].knows(again, index) for index in range(10))


@pytest.mark.parametrize("depth", [0, 1])
def test_an_answer_is_found_by_the_next_turn(depth: int) -> None:
    """Blocks that an answer filled are found up to its last token, whose row was never computed."""
    engine, _, manager = Base(depth=depth).engine()
    answered = _run(engine, manager, list(range(5)), new=4).progress.tokens
    assert _run(engine, manager, [*answered, 1]).progress.num_cached == len(answered) - 1


@pytest.mark.parametrize("snapshots", [None, 3])
def test_after_a_failed_step_nothing_is_trusted(snapshots: int | None) -> None:
    """All sequences end once as FAILED, steps under way are dropped, and nothing of theirs is found."""
    engine, device, manager = Base(snapshots=snapshots, spacing=1, depth=1).engine()
    prompt = list(range(20))
    if manager.states is not None:
        _run(engine, manager, prompt)
    failing = Sequence("failing", [*prompt, *range(30, 40)], SamplingParams(max_tokens=9))
    device.broken = True
    engine.add(failing)
    engine.step()
    device.broken = False
    assert [output.finish for output in engine.fail_all()] == [EndReason.FAILED]
    assert not engine.inspect().steps
    if manager.states is not None:
        manager.release(failing)  # twice frees nothing twice
        manager.keep()
        assert manager.states.longest(failing, 7) == 0
        assert manager.states.num_free == manager.states.num_slots
        assert manager.copies() == ()
    again = _run(engine, manager, prompt, new=2)
    assert again.progress.num_cached == 0
    assert again.progress.tokens[20:] == _expected(prompt, again.sampling, 0, (None,), snapshots is not None)


def test_a_failing_step_loses_no_end_of_the_others() -> None:
    """A sequence whose deadline passed before a step that raised ends with it, the others as FAILED."""
    engine, device, _ = Base().engine()
    late, other = (
        Sequence(name, [1], SamplingParams(), deadline_s=at) for name, at in (("late", -1.0), ("other", None))
    )
    device.broken = True
    engine.add(late)
    engine.add(other)
    with pytest.raises(RuntimeError):
        engine.step()
    ends = {output.seq_id: output.finish for output in engine.fail_all()}
    assert ends == {"late": EndReason.DEADLINE, "other": EndReason.FAILED}


def test_a_deadline_ends_a_sequence_with_a_token_in_flight() -> None:
    """A token that was drawn for an expired sequence is dropped, and its blocks come back; so for the next."""
    now_s = [0.0]
    engine, _, manager = Base(depth=1).engine(lambda: now_s[-1])
    for name, deadline_s in (("later", 3.0), ("late", 1.0)):
        engine.add(Sequence(name, [1, 2], SamplingParams(max_tokens=9), deadline_s=deadline_s))
    engine.step()
    for at_s, name in ((2.0, "late"), (4.0, "later")):
        now_s.append(at_s)
        ended = [(output.seq_id, output.finish) for output in engine.step() if output.finish]
        assert ended == [(name, EndReason.DEADLINE)]
    assert engine.idle
    assert manager.groups[0].pool.num_free == manager.groups[0].pool.num_blocks


def test_repeated_text_comes_in_few_steps() -> None:
    """Steps after the first round of a model that goes in a circle give as many tokens as a draft allows."""
    engine, device, manager = Base((1,), drafted=3).engine()
    seq = _run(engine, manager, [1, 2], new=30)
    assert seq.progress.tokens[2:] == _expected([1, 2], seq.sampling, 0, (1,), stateful=False)
    stats = engine.stats
    assert len(device.lengths) + stats.tokens_accepted == stats.tokens_generated == 30
    assert stats.tokens_accepted > 15
    assert max(lengths[seq.id] for lengths in device.lengths[1:]) == 4


def test_who_was_called_elsewhere_in_a_block_has_another_block() -> None:
    """The same tokens are two blocks where one adapter acts on more of them; before, they are one."""
    emitted, sampling = [0, 2, 4, 0, *INVOCATION], SamplingParams(max_tokens=2)
    seqs = [_sequence(prompt, sampling, 3) for prompt in ([*emitted], [*emitted, *INVOCATION])]
    seqs[0].progress.tokens += INVOCATION
    keys = [[prefix_key(seq, index, BLOCK) for index in range(2)] for seq in seqs]
    assert seqs[0].progress.tokens == seqs[1].progress.tokens
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def _seq(tokens: list[int], uid: int = 0, salt: str = "") -> Sequence:
    adapter = Adapter(f"a{uid}") if uid else None  # of another load each time
    return Sequence(str(next(_ids)), list(tokens), SamplingParams(), adapter, cache_salt=salt)


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
    assert not blocks.still_refused(head, 0.1)  # beside others, some must stay free
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


def test_the_state_that_was_reached_longest_ago_leaves_first() -> None:
    """A state that is reached again without being found stays as one that is used does."""
    blocks = BlockManager(9, BLOCK, states=StateSlots(3, BLOCK, 1))
    for token in (1, 2, 1, 3):
        seq = Sequence(str(next(_ids)), [token] * 5, SamplingParams(prompt_logprobs=0))
        assert blocks.start(seq)
        seq.progress.num_computed = BLOCK
        blocks.register(seq)
        blocks.keep()
        blocks.release(seq)
    found = [_seq([token] * 5) for token in (2, 1)]
    assert [blocks.start(seq) and seq.progress.num_computed for seq in found] == [0, BLOCK]


def test_blocks_that_nobody_can_find_are_handed_out_first() -> None:
    """Blocks without a key go before those that hold a known prefix, however late they became free."""
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for key, block in enumerate(blocks[:3]):
        pool.note(key, block)
        pool.release(block)
    pool.note(1, blocks[3])
    assert pool.take() == blocks[1]
    pool.forget(2)
    assert pool.take() == blocks[2]
    for block in (blocks[3], blocks[2]):
        pool.release(block)
    assert pool.take() == blocks[2]


def test_a_prefix_that_was_computed_again_stays_known() -> None:
    """A key moves from a free block to one that a sequence holds, so that the free one can be reused."""
    blocks, prompt = BlockManager(4, BLOCK), list(range(9))
    for scored, tokens in ((None, 9), (0, 13)):
        seq = Sequence(str(next(_ids)), list(prompt), SamplingParams(prompt_logprobs=scored))
        assert blocks.start(seq)
        seq.progress.num_computed = 9
        blocks.register(seq)
        assert blocks.grow(seq, tokens)
        blocks.release(seq)
    found = _seq(prompt)
    assert blocks.start(found)
    assert found.progress.num_computed == 8
