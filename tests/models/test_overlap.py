"""The engine one step ahead: a token is used before it is known, and nothing changes but when it is seen."""

import itertools
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings, strategies as st

from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence, StepOutput, Token
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.runner import Pending, lay_out
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import World, run_engine

BLOCK = 4
TOKENS = 5
LIMITS = SchedulerLimits(max_tokens=16, max_seqs=4, max_adapters=2, max_seq_len=40)
HANDLES = [Adapter(f"{number:064x}", number) for number in range(8)]
_ids = itertools.count()


@dataclass
class Device:
    """A runner whose next token is a checksum of its cache, or with a memory of the last tokens alone."""

    depth: int
    memory: int = 0
    cache: dict[int, tuple[int, int]] = field(default_factory=dict)
    drawn: dict[Sequence, int] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    lengths: list[dict[str, int]] = field(default_factory=list)
    broken: bool = False

    def submit(self, batch: Batch) -> Pending:
        """Write the rows' tokens and read their contexts."""
        rows = lay_out(batch, self.drawn)
        provided = zip(rows.tokens, rows.sources, strict=True)
        tokens = [token if source < 0 else self.ids[source] for token, source in provided]
        for chunk, context in zip(rows.arrangement.chunks, rows.contexts, strict=True):
            for row in range(context.length):
                place = _place(context.blocks, chunk.start + row)
                self.cache[place] = tokens[context.row + row], _uid(chunk.seq)
        ends = {chunk.seq: chunk.end - chunk.drafted for chunk in batch.chunks}
        draws = zip(rows.sampled, rows.ahead, strict=True)
        found = [
            [self.cache[_place(s.progress.blocks, at)] for at in range(ends[s] + more)] for s, more in draws
        ]
        self.drawn = {seq: place for place, seq in enumerate(rows.sampled)}
        if self.memory:
            for seq, more, content in zip(rows.sampled, rows.ahead, found, strict=True):
                expected = [*seq.progress.tokens, *batch.drafts.get(seq, [])[:more]]
                assert [token for token, _ in content][: len(expected)] == expected
        ids = self.ids = [_checksum(content[-self.memory :]) for content in found]
        self.lengths.append({chunk.seq.id: chunk.length for chunk in batch.chunks})
        broken = self.broken

        def wait() -> list[Token]:
            if broken:
                raise RuntimeError
            return [Token(token) for token in ids]

        return Pending(tuple(rows.sampled), wait, drafts=rows.drafts)


def _place(blocks: Iterable[int], position: int) -> int:
    return list(blocks)[position // BLOCK] * BLOCK + position % BLOCK


def _checksum(content: list[tuple[int, int]]) -> int:
    return zlib.crc32(repr(content).encode()) % TOKENS


def _uid(seq: Sequence) -> int:
    return seq.slot + 1


def _expected(prompt: list[int], sampling: SamplingParams, uid: int, memory: int = 0) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < LIMITS.max_seq_len and len(tokens) - len(prompt) < sampling.max_tokens:
        tokens.append(_checksum([(token, uid) for token in tokens[-memory:]]))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(prompt) :]


def _engine(
    depth: int,
    blocks: int = 64,
    *,
    prefix_cache: bool = True,
    max_tokens: int = 16,
    speculative: int = 0,
    memory: int = 0,
) -> tuple[Engine, Device, BlockManager]:
    manager = BlockManager(blocks, BLOCK, prefix_cache=prefix_cache)
    device = Device(depth, memory)
    limits = replace(LIMITS, max_tokens=max_tokens, speculative_tokens=speculative)
    return Engine(device, limits, manager, Residents(), clock=lambda: 0.0), device, manager


def _seq(
    prompt: list[int], sampling: SamplingParams, uid: int = 0, deadline_s: float | None = None
) -> Sequence:
    adapter = HANDLES[uid - 1] if uid else None
    return Sequence(str(next(_ids)), list(prompt), sampling, adapter, deadline_s=deadline_s)


def _drain(engine: Engine) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    for _ in range(2000):
        if engine.idle:
            return outputs
        outputs += engine.step()
    raise AssertionError("the engine did not come to an end")


REQUEST = st.tuples(
    st.integers(1, 20),  # tokens of the prompt
    st.integers(1, 30),  # new tokens at most
    st.integers(0, 3),  # adapter
    st.sampled_from([frozenset(), frozenset({3}), frozenset({0, 1})]),  # stop tokens
    st.booleans(),  # one of few prompts, so that prefixes meet
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(REQUEST, st.just("step"), st.integers(0, 9)), min_size=1, max_size=40),
    st.integers(10, 24),
    st.booleans(),
    st.integers(0, 1),
    st.sampled_from([2, 16]),  # tokens of a step: fewer than sequences, or enough for prompts beside them
    st.sampled_from([(0, 0), (0, 0), (1, 2), (3, 1), (3, 2), (9, 2)]),  # tokens of a draft; memory
)
def test_every_answer_is_what_the_model_says(
    actions: list[object], blocks: int, prefix_cache: bool, depth: int, max_tokens: int, drafts: tuple[int, int]
) -> None:
    """Answers equal those of the request alone through chunks, preemption, stops, drafts and aborts."""
    speculative, memory = drafts
    engine, _, manager = _engine(
        depth, blocks, prefix_cache=prefix_cache, max_tokens=max_tokens, speculative=speculative, memory=memory
    )
    added: dict[str, tuple[list[int], SamplingParams, int]] = {}
    outputs: list[StepOutput] = []
    aborted: set[str] = set()
    for action in actions:
        if action == "step":
            outputs += engine.step()
        elif isinstance(action, int):
            ended = aborted | {output.seq_id for output in outputs if output.finish}
            going = [seq_id for seq_id in added if seq_id not in ended]
            for seq_id in going[action : action + 1]:
                engine.abort(seq_id)
                aborted.add(seq_id)
        elif isinstance(action, tuple):
            length, new, uid, stops, common = action
            draw = random.Random(0 if common else next(_ids))
            prompt = [draw.randrange(TOKENS) for _ in range(length)]
            seq = _seq(prompt, SamplingParams(max_tokens=new, stop_token_ids=stops), uid)
            added[seq.id] = prompt, seq.sampling, uid
            engine.add(seq)
    outputs += _drain(engine)
    for seq_id, (prompt, sampling, uid) in added.items():
        mine = [output for output in outputs if output.seq_id == seq_id]
        answer = [output.token.id for output in mine if output.token]
        expected = _expected(prompt, sampling, uid, memory)
        assert answer == (expected[: len(answer)] if seq_id in aborted else expected)
        assert [output.first for output in mine] == [True, *[False] * (len(mine) - 1)][: len(mine)]
        assert sum(output.finish is not None for output in mine) == (seq_id not in aborted)
    assert manager.num_free == manager.num_blocks


def test_repeated_text_comes_in_few_steps() -> None:
    """Steps after the first round of a model that goes in a circle give as many tokens as a draft allows."""
    engine, device, _ = _engine(0, speculative=3, memory=1)
    engine.add(_seq([1, 2], SamplingParams(max_tokens=30)))
    outputs = _drain(engine)
    assert [output.token.id for output in outputs if output.token] == _expected(
        [1, 2], SamplingParams(max_tokens=30), 0, 1
    )
    stats = engine.stats
    assert len(device.lengths) + stats.tokens_accepted == stats.tokens_generated == 30
    assert stats.tokens_accepted > 15
    assert max(lengths.popitem()[1] for lengths in device.lengths[1:]) == 4


def test_a_deadline_ends_a_sequence_with_a_token_in_flight() -> None:
    """A token that was drawn for an expired sequence is dropped, and its blocks come back."""
    engine, _, manager = _engine(1)
    late = _seq([1, 2], SamplingParams(max_tokens=9), deadline_s=1.0)
    engine.add(late)
    engine.step()
    engine._clock = lambda: 2.0
    assert [(output.seq_id, output.finish) for output in engine.step()] == [(late.id, EndReason.DEADLINE)]
    assert engine.idle
    assert manager.num_free == manager.num_blocks


def test_after_a_failed_step_nothing_is_trusted() -> None:
    """All sequences end once as FAILED, steps under way are dropped, and no prefix of theirs is found."""
    engine, device, manager = _engine(1)
    prompt = [1, 2, 3, 4, 5, 6]
    device.broken = True
    engine.add(_seq(prompt, SamplingParams(max_tokens=9)))
    engine.step()
    device.broken = False
    assert [output.finish for output in engine.fail_all()] == [EndReason.FAILED]
    again = _seq(prompt, SamplingParams(max_tokens=2))
    engine.add(again)
    answer = [output.token.id for output in _drain(engine) if output.token]
    assert answer == _expected(prompt, again.sampling, 0)
    assert device.lengths[1] == {again.id: 6}
    assert manager.num_free == manager.num_blocks


def test_a_failing_step_loses_no_end_of_the_others() -> None:
    """A sequence whose deadline passed before a step that raised ends with it, the others as FAILED."""
    engine, device, _ = _engine(0)
    late, other = _seq([1], SamplingParams(), deadline_s=-1.0), _seq([2], SamplingParams())
    device.broken = True
    engine.add(late)
    engine.add(other)
    with pytest.raises(RuntimeError):
        engine.step()
    ends = {output.seq_id: output.finish for output in engine.fail_all()}
    assert ends == {late.id: EndReason.DEADLINE, other.id: EndReason.FAILED}


def test_what_shapes_its_logits_is_not_drafted(world: tuple[World, MemoryStore]) -> None:
    """A penalty looks at the tokens in between; the answer is that of a replica without drafts."""
    requests = [("base", [5, 6, 7, 8] * 4)]
    answers = []
    for drafts in (0, 6):
        ready = world[0].load(world[1], native=False, speculative_tokens=drafts)
        answers.append(run_engine(ready, requests, 30, presence_penalty=-2.0))
        assert ready.engine.stats.tokens_drafted == 0
    assert answers[0] == answers[1]
