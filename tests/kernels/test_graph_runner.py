"""Decode steps replayed from graphs: on a GPU, or in the interpreter from tapes."""

import itertools
from array import array
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from inference_service.core.adapter import MOST_PARTS
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence, Token
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.engine import Engine
from inference_service.engine.execution.buffers import PAIR, StepBuffers, StepCapacity, StepMemory
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.runner import Pending, lay_out
from inference_service.engine.kernels.attention import cut_of
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.lookup import Expected, Lookup
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from loramux_shared.bases.memory import blend_buckets, buckets
from loramux_shared.runtime import Pooling
from loramux_shared.storage.memory import MemoryStore
from tests.support.grammars import ScriptedGrammar
from tests.support.pooled import run_pooled
from tests.support.recorded import BLOCK, CountingRecorder, runner_of, with_runner
from tests.support.tiny import VOCAB, Replica, World, make_world, run_engine, sequence

pytestmark = pytest.mark.whole
BLOCKS = 16
LIMITS = SchedulerLimits(max_tokens=40, max_seqs=4, max_adapters=3, max_seq_len=64)
"""The largest steps have the long segments of prompts."""
TOKENS = 3
"""Tokens per request: a prompt and consecutive decodes. A step takes seconds in the interpreter."""
REQUESTS = [
    ("all", [5, 6, 7, 8, 9]),
    ("base", [9, 8, 7]),
    ("rs", list(range(20, 40))),
    ("wide", [11]),
    ("rs*1.5 + all*-0.5", [3, 4, 5]),
    ("wide*0.5", [3, 4, 5]),
    ("base", [3, 4]),
    ("rs*0.5 + all*0.4 + wide*0.3", [6, 7, 8]),
    ("wide", list(range(3, 40))),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A model of one layer; steps of several are recorded in `test_recorded_steps.py`."""
    world = make_world(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1)
    return world, world.built(max_lora_rank=16)


@pytest.fixture(scope="module")
def ready(world: tuple[World, MemoryStore]) -> Replica:
    return world[0].load(world[1], backend="triton")


@pytest.fixture(scope="module")
def recorder() -> CountingRecorder:
    return CountingRecorder()


@pytest.fixture(scope="module")
def runner(ready: Replica, recorder: CountingRecorder) -> GraphRunner:
    runner = runner_of(ready, LIMITS, BLOCKS, recorder=recorder)
    runner.capture()
    return runner


@pytest.mark.parametrize(
    ("kind", "requests"), [("mixed", REQUESTS), ("base", REQUESTS[1:2])], ids=["mixed", "base"]
)
def test_graphs_give_the_tokens_of_the_torch_backend(
    world: tuple[World, MemoryStore],
    ready: Replica,
    runner: GraphRunner,
    recorder: CountingRecorder,
    kind: str,
    requests: Sequence[tuple[str, list[int]]],
) -> None:
    """Graphs recorded without a row serve any number of rows and adapters at each replay, prompts too."""
    expected = run_engine(world[0].load(world[1], backend="torch", native=False), requests, TOKENS)
    recorder.replays.clear()
    assert run_engine(with_runner(ready, runner, LIMITS, BLOCKS), requests, TOKENS) == expected
    graphs = runner.inspect().graphs
    # Every step but those of blends with prompts, which are traced.
    steps, kinds = {"mixed": (7, {1, PAIR, MOST_PARTS}), "base": (TOKENS, {0})}[kind]
    assert len(recorder.replays) >= steps
    assert {graphs[number].adapters for number in recorder.replays} == kinds


def test_vectors_are_read_from_recorded_steps(
    world: tuple[World, MemoryStore], ready: Replica, runner: GraphRunner, recorder: CountingRecorder
) -> None:
    """Last states and means come out of replayed steps, beside tokens that are drawn."""
    last, mean = [("all", [5, 6, 7, 8]), ("base", [9, 8, 7])], [("wide", [11, 3])]
    reference = world[0].load(world[1], backend="torch", native=False)
    for request in (
        [(*each, Pooling.LAST) for each in last],
        [(*last[0], Pooling.LAST), (*mean[0], Pooling.MEAN)],
    ):
        expected, answers = run_pooled(reference, request, ["rs"], [3, 4, 5], 2)
        recorder.replays.clear()
        replayed = with_runner(ready, runner, LIMITS, BLOCKS)
        found, emitted = run_pooled(replayed, request, ["rs"], [3, 4, 5], 2)
        assert emitted == answers
        assert len(recorder.replays) == 2
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)


Query = tuple[str, list[int], SamplingParams]


def walk() -> ScriptedGrammar:
    """A grammar where each token says which may follow: the multiples of 7, moved by it."""
    return ScriptedGrammar(lambda before: range((3 * before[-1] + 1) % 7 if before else 0, VOCAB, 7))


def _run(ready: Replica, requests: Sequence[Query], walking: Collection[int] = ()) -> list[list[Token]]:
    """Run requests together, some by number with a grammar; return the tokens of each."""
    engine = ready.core
    tokens: dict[str, list[Token]] = {}
    for number, (name, prompt, sampling) in enumerate(requests):
        adapter = ready.service.local.catalog.get(name).adapter
        grammar = walk() if number in walking else None
        engine.add(EngineSequence(str(number), list(prompt), sampling, adapter, grammar=grammar))
        tokens[str(number)] = []
    while not engine.idle:
        for output in engine.step():
            tokens[output.seq_id].append(output.token)
    assert engine.stats.blocks_free == engine.stats.blocks_total
    return list(tokens.values())


PARITY = {(token,): (*range(token % 2, VOCAB, 2),) for token in range(VOCAB)}
"""Bad words: two odd tokens one after the other, and two even ones."""
SHAPING = [
    SamplingParams(max_tokens=6, temperature=1.0, seed=4),
    SamplingParams(max_tokens=6, repetition_penalty=0.9, frequency_penalty=-50.0),
    SamplingParams(max_tokens=6, temperature=0.8, top_k=9, seed=7, logprobs=1),
    SamplingParams(max_tokens=6, bad_words={0: {(): (3, 4)}, 1: PARITY}),
]


def test_no_request_sits_out_a_step(
    world: tuple[World, MemoryStore], ready: Replica, runner: GraphRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with penalties and grammars have a row in every step, and the tokens of the torch backend."""
    requests = [(name, prompt[:4], params) for (name, prompt), params in zip(REQUESTS, SHAPING, strict=False)]
    plain = world[0].load(world[1], backend="torch", native=False)
    expected = [[token.id for token in tokens] for tokens in _run(plain, requests, walking=[2])]
    unshaped = [(name, prompt, SamplingParams(max_tokens=6)) for name, prompt, _ in requests]
    free = [[token.id for token in tokens] for tokens in _run(plain, unshaped)]
    steps: list[int] = []
    submit = runner.submit

    def counted(batch: Batch) -> Pending:
        steps.append(len(batch.chunks))
        return submit(batch)

    monkeypatch.setattr(runner, "submit", counted)
    found = _run(with_runner(ready, runner, LIMITS, BLOCKS), requests, walking=[2])
    assert [[token.id for token in tokens] for tokens in found] == expected
    assert steps == [4] * 6
    assert all((one + other) % 2 for one, other in pairwise(expected[3]))
    assert len(set(expected[1])) == 1
    assert [ours == theirs for ours, theirs in zip(expected, free, strict=True)] == [False] * 4
    assert all(token.logprob is not None for token in found[2])


def test_recording_touches_no_cache(ready: Replica) -> None:
    """Graphs may be recorded again while the cache holds prefixes, and a token is in flight."""
    limits = replace(LIMITS, max_seqs=1, max_tokens=16)
    runner = runner_of(ready, limits, BLOCKS)
    [expected] = run_engine(with_runner(ready, runner, limits, BLOCKS), REQUESTS[:1], TOKENS)
    engine = with_runner(ready, runner, limits, BLOCKS).core
    engine.add(sequence(ready, "0", *REQUESTS[0], SamplingParams(max_tokens=TOKENS)))
    assert engine.step() == []  # its first token is in flight
    runner.capture()
    runner.record_one()
    tokens: list[int] = []
    while not engine.idle:
        tokens += [output.token.id for output in engine.step()]
    assert tokens == expected
    for part in itertools.chain.from_iterable(runner.cache.layers):
        part.fill_(0.5)
    runner.capture()
    runner.record_one()
    assert all((part == 0.5).all() for part in itertools.chain.from_iterable(runner.cache.layers))


class Copies(TorchDispatchMode):
    """Counts copies into memory that was there before."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **kwargs or {})


def test_one_copy_fills_the_buffers_of_a_step(ready: Replica) -> None:
    """A step copies tokens, sources, positions, tables, segments and sampling at once, and only used parts."""
    seqs = []
    adapters = [ready.service.local.catalog.get(name).adapter for name in ("all", "rs")]
    in_order = sorted(filter(None, adapters), key=lambda adapter: adapter.slot or 0)
    for place, (name, adapter) in enumerate([("base", None), ("one", in_order[0]), ("other", in_order[1])]):
        seq = EngineSequence(name, [3, 4, 5 + place], SamplingParams(temperature=1.0, seed=place), adapter)
        seq.progress.blocks, seq.progress.num_computed = array("i", [place]), 2
        seqs.append(seq)
    seqs[1].progress.num_computed, seqs[1].progress.in_flight = 3, 1
    rows = lay_out(Batch(tuple(Chunk(seq, 1) for seq in seqs)), {seqs[1]: 2})
    model = ready.base.model
    capacity = StepCapacity(
        rows=4,
        seqs=4,
        mixed=False,
        max_seqs=4,
        blocks_per_seq=4,
        block_size=BLOCK,
        cuts=tuple([cut_of(model.device, model.dtype, each) for each in model.config.heads]),
        groups=1,
        delta_tile=None,
        slots=cast(TritonLora, ready.lora).num_slots,
        active=3,
    )
    memory = StepMemory(4, capacity.size, VOCAB, model.device)
    buffers = StepBuffers(capacity, memory)
    memory.drawn[2] = 77
    with Copies() as copies:
        buffers.load(rows)
    assert copies.count == 1
    assert buffers.tokens().tolist() == [5, 77, 7, 0]
    assert buffers.positions.tolist() == [2, 3, 2, 0]
    assert buffers.last_rows.tolist() == [0, 1, 2, 0]
    (tables,) = buffers.attention.values()
    assert tables.cache_rows.tolist() == [2, BLOCK + 3, 2 * BLOCK + 2, -1]
    assert buffers.segments[0].token_ids[:2].tolist() == [1, 2]
    assert buffers.sampling.rows[:, 0].tolist() == [2, 2, 2, 0]


def test_there_are_graphs_for_few_and_for_many_rows() -> None:
    """Powers of two up to 8, multiples of 8 from there, and the limit itself."""
    assert list(buckets(1)) == [1]
    assert list(buckets(4)) == [1, 2, 4]
    assert list(buckets(8)) == [1, 2, 4, 8]
    assert list(buckets(36)) == [1, 2, 4, 8, 16, 24, 32, 36]
    for most in (1, 8, 36, 256):
        assert {*blend_buckets(most)} <= {*buckets(most)}
    assert blend_buckets(256) == [8, 32, 128, 256]


def test_drafts_are_verified_row_by_row(
    world: tuple[World, MemoryStore], ready: Replica, recorder: CountingRecorder
) -> None:
    """Tokens drawn behind drafts are those of single steps, for sampled ones and those of a grammar too."""
    lengths = {"base": 8, "wide": 8, "rs": 14}
    requests = [
        (name, prompt, SamplingParams(max_tokens=lengths[name], temperature=1.0, seed=3))
        for name, prompt in zip(lengths, (prompt for _, prompt in REQUESTS), strict=False)
    ]
    plain = world[0].load(world[1], backend="torch", native=False)
    expected = [[token.id for token in tokens] for tokens in _run(plain, requests, walking=[2])]
    known = {tuple(prompt): answer for (_, prompt, _), answer in zip(requests, expected, strict=True)}

    class Knowing(Lookup):
        """Expects the right tokens, and every other time a wrong one behind them."""

        def expect(self, seq: EngineSequence, most: int) -> Expected:
            expected = super().expect(seq, most)
            right = known[tuple(seq.progress.tokens[: seq.num_prompt])][seq.num_known :][:most]
            expected.tokens = [*right[:-1], (right[-1] + 1) % VOCAB] if seq.num_known % 2 == 0 else right
            expected.chances = [0.9, 0.9]
            return expected

    limits = replace(LIMITS, speculative_tokens=3)
    runner = runner_of(ready, limits, BLOCKS, recorder=recorder, depth=0)
    blocks = BlockManager(BLOCKS, BLOCK)
    engine = Engine(runner, limits, blocks, Residents(), lambda: 0.0, Knowing())
    drafting = replace(ready, core=engine)
    found = [[token.id for token in tokens] for tokens in _run(drafting, requests, walking=[2])]
    assert found == expected
    stats = engine.stats
    assert stats.tokens_drafted > stats.tokens_accepted > 3
