"""Steps that raise for one sequence: it ends alone, and the others answer as if it had never come."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import NOWHERE, Batch, EndReason, Sequence, StepOutput, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.blocks import StateSlots
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from loramux_shared.runtime import Pooling
from tests.support.examples import examples

BLOCK = 4
PRIME = 8191


def following(tokens: Iterable[int]) -> int:
    """Return the token behind others, of which each matters."""
    state = 0
    for token in tokens:
        state = (31 * state + token + 1) % PRIME
    return state


class Machine:
    """Draws each token from what the cache holds of all before, in blocks and, with slots, in a state.

    Where a step raises, it has written some of its rows, and taken states of all sequences on.
    """

    def __init__(self, depth: int, raises: Callable[[set[str]], bool], *, late: bool = False) -> None:
        self.depth, self._raises, self._late = depth, raises, late
        self.cells: dict[int, int] = {}
        self.states: dict[int, int] = {}
        self._drawn: dict[Sequence, int] = {}

    def submit(self, batch: Batch) -> Pending:
        for copies in batch.copies:
            self.states |= {to: self.states.get(source, 0) for to, source in copies.items()}
        raises = self._raises({chunk.seq.id for chunk in batch.chunks})
        drawn: dict[Sequence, int] = {}
        for chunk in batch.chunks:
            seq, blocks, slot = chunk.seq, chunk.seq.progress.blocks, chunk.seq.progress.state_slot
            known = [*seq.progress.tokens, *([self._drawn[seq]] if seq.progress.in_flight else [])]
            for at in range(chunk.start, chunk.end):
                self.cells[blocks[at // BLOCK] * BLOCK + at % BLOCK] = known[at]
            if slot != NOWHERE:
                before = self.states.get(slot, 0) if chunk.start else 0
                for token in known[chunk.start : chunk.end]:
                    before = (31 * before + token + 1) % PRIME
                self.states[slot] = before
            if raises and not self._late:
                raise RuntimeError(seq.id)
            if chunk.samples:
                read = (self.cells[blocks[at // BLOCK] * BLOCK + at % BLOCK] for at in range(chunk.end))
                drawn[seq] = following(read) if slot == NOWHERE else self.states[slot]
        self._drawn = drawn
        texts = {seq: token for seq, token in drawn.items() if seq.pooling is None}
        vectors = [(seq, np.array([token], np.float32)) for seq, token in drawn.items() if seq.pooling]

        def wait() -> list[Token]:
            if raises:
                raise RuntimeError("late")
            return [Token(token) for token in texts.values()]

        return Pending(tuple(texts), wait, vectors=lambda: vectors)


class World:
    """An engine on a machine, and what came of each sequence."""

    def __init__(self, machine: Machine, *, states: bool = False, blocks: int = 96) -> None:
        slots = StateSlots(14, BLOCK, 2) if states else None
        self.blocks = BlockManager(blocks, BLOCK, states=slots)
        self.now_s = 0.0
        limits = SchedulerLimits(24, 6, 2, max_seq_len=96)
        self.engine = Engine(machine, limits, self.blocks, Residents(), clock=lambda: self.now_s)
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, EndReason] = {}
        self.failures = 0

    def ask(self, name: str, prompt: list[int], new: int, **fields: Any) -> None:
        self.tokens[name] = []
        self.engine.add(Sequence(name, prompt, SamplingParams(max_tokens=new), **fields))

    def step(self) -> None:
        try:
            outputs = self.engine.step()
        except RuntimeError:
            self.failures += 1
            outputs = self.engine.set_aside()
            self._probe()
            self.engine.retry()
        self._take(outputs)

    def _probe(self) -> None:
        """Run a step that works, as the engine's thread does."""
        assert self.engine.idle
        self.engine.add(Sequence("probe", [0], SamplingParams(max_tokens=1)))
        while not self.engine.idle:
            assert all(output.seq_id == "probe" for output in self.engine.step())

    def _take(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            assert output.seq_id not in self.ends
            if output.token is not None:
                self.tokens[output.seq_id].append(output.token.id)
            if output.finish is not None:
                self.ends[output.seq_id] = output.finish

    def run(self, most: int = 2000) -> None:
        while self.engine.idle_until_s <= self.now_s and most:
            self.step()
            most -= 1
        assert self.engine.idle
        assert self.engine.stats.waiting == self.engine.stats.running == 0
        assert self.blocks.num_free == self.blocks.num_blocks
        if self.blocks.states is not None:
            self.blocks.keep()
            assert self.blocks.states.num_free == self.blocks.states.num_slots


def answer(prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


SEQUENCES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 12)), min_size=1, max_size=12
)


@given(SEQUENCES, st.sampled_from([0, 1]), st.booleans(), st.booleans())
@settings(max_examples=examples(60))
def test_who_a_step_raises_for_ends_alone(
    sequences: list[tuple[int, int, bool, int]], depth: int, states: bool, late: bool
) -> None:
    """Sequences that raise end as FAILED, at whichever step they come; the others end with their answers."""
    bad = {str(number) for number, (_, _, raises, _) in enumerate(sequences) if raises}
    world = World(Machine(depth, lambda ids: bool(ids & bad), late=late), states=states)
    shared = list(range(30))  # prompts begin alike, so that the prefix cache has hits
    for at in range(13):
        for number, (length, new, _, comes) in enumerate(sequences):
            if comes == at:
                world.ask(str(number), [*shared[: length - 1], 1000 + number % 3], new)
        world.step()
    world.run()
    for number, (length, new, raises, _) in enumerate(sequences):
        name, prompt = str(number), [*shared[: length - 1], 1000 + number % 3]
        assert world.ends[name] is (EndReason.FAILED if raises else EndReason.LENGTH)
        assert raises or world.tokens[name] == answer(prompt, new)


def test_a_failure_of_several_together_ends() -> None:
    """Sequences that raise only together go on once, and end where a step raises with them again."""
    world = World(Machine(0, lambda ids: len(ids & {"a", "b", "c"}) > 1))
    for name in "abcd":
        world.ask(name, [3, 4], 12)
    world.run()
    assert world.ends == dict.fromkeys("abc", EndReason.FAILED) | {"d": EndReason.FAILED}
    assert len(world.tokens["d"]) == 1  # it went on once
    world.ask("e", [3, 4], 3)
    world.run()
    assert world.tokens["e"] == answer([3, 4], 3)


def test_a_passing_failure_ends_nobody() -> None:
    """A step that raised for want of memory, say, and does not again costs rows and no answer."""
    failures = iter([False, False, True])
    world = World(Machine(0, lambda _: next(failures, False)))
    for name in "abcd":
        world.ask(name, [3, 4, ord(name)], 7)
    world.run()
    assert world.failures == 1
    assert world.tokens == {name: answer([3, 4, ord(name)], 7) for name in "abcd"}


def test_who_leaves_or_is_late_meanwhile_is_not_waited_for() -> None:
    """Sequences that are set aside are aborted, or end at their deadlines; new ones begin behind the search."""
    world = World(Machine(0, lambda ids: "bad" in ids))
    for name in ("gone", "left", "bad", "late"):
        world.ask(name, [5, 6], 6, deadline_s=9.0 if name == "late" else None)
    while not world.failures:
        world.step()
    world.ask("new", [5, 6], 2)
    world.engine.abort("gone")
    assert sum(world.engine.sequence_counts.waiting.values()) == world.engine.stats.waiting == 4
    world.now_s = 10.0
    world.run()
    assert world.ends == {
        "left": EndReason.LENGTH, "bad": EndReason.FAILED, "late": EndReason.DEADLINE, "new": EndReason.LENGTH,
    }  # fmt: skip


@pytest.mark.parametrize("pooling", [Pooling.LAST, Pooling.MEAN])
def test_vectors_are_computed_again(pooling: Pooling) -> None:
    """A sequence whose vector fails ends alone; the others have their vectors."""
    world = World(Machine(0, lambda ids: "bad" in ids, late=True))
    for name in ("a", "bad", "b"):
        world.ask(name, [5, 6, 7], 0, pooling=pooling)
    world.run()
    assert world.ends == {"a": EndReason.LENGTH, "bad": EndReason.FAILED, "b": EndReason.LENGTH}
