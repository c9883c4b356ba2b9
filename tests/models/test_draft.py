"""A draft model beside adapters: answers stay the same, refusals have names, and drafts follow their cost."""

import itertools
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from inference_service.adapters.follower import needs_restart
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.engine import Engine
from inference_service.engine.execution.drafts.choice import DraftChoice
from inference_service.engine.execution.drafts.model import DraftModel
from inference_service.engine.execution.runner import Pending, Runner
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from inference_service.startup.draft import LEAST_BLOCKS
from inference_service.startup.engine import build_engine
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.faults import Fault, SettingsInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.examples import examples
from tests.support.grammars import ScriptedGrammar
from tests.support.tiny import ADAPTERS, VOCAB, Replica, World, make_world, sequence

MODELS = ("base", "base", *ADAPTERS, "wide*0.5+rs*0.5")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 7, "top_p": 0.9},
    {"temperature": 0.0, "presence_penalty": 1.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": frozenset(range(3, 40))},
)
REQUEST = st.tuples(
    st.sampled_from(MODELS),
    st.integers(1, 40),  # tokens of the prompt
    st.integers(1, 30),  # new tokens at most
    st.sampled_from(SAMPLINGS),
    st.booleans(),  # with a grammar
    st.booleans(),  # one of few prompts, so that prefixes meet
)


def speculator(folder: Path) -> dict[str, Any]:
    """A draft model for the block `runtime`."""
    return {"speculator": {"model": {"source": "LOCAL", "repo": str(folder)}, "tokens": 4}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """A world whose draft model is its base: the base's tokens hold, and of the adapters' few."""
    world, store = make_world(tmp_path_factory.mktemp("drafts")), MemoryStore()
    world.build_with(store, runtime=speculator(world.base))
    return world, store


def load_drafting(world: tuple[World, MemoryStore]) -> Replica:
    """Load a replica with few blocks that drafts whatever it takes."""
    ticks = itertools.count()
    build = partial(build_engine, clock=lambda: float(next(ticks)))
    return world[0].load(world[1], build=build, kv_memory_gb=64e-6, max_batch_tokens=32, max_batch_seqs=16)


@pytest.fixture(scope="module")
def replicas(world: tuple[World, MemoryStore]) -> tuple[Replica, Replica]:
    """A replica that drafts, and one that does not."""
    return load_drafting(world), world[0].load(world[1], speculative_tokens=0)


def draft_model(ready: Replica, depth: int) -> DraftModel:
    """Return the base of a replica as a draft model, with a runner of its own."""
    runner = Runner(ready.base.model, ready.lora, LEAST_BLOCKS, 16, depth=depth)
    return DraftModel(runner, BlockManager(LEAST_BLOCKS, 16), VOCAB, LEAST_BLOCKS * 16)


def run(ready: Replica, actions: list[Any]) -> dict[str, tuple[list[int], bool]]:
    """Take in requests, steps, and aborts by place; return each request's tokens, and if it was aborted."""
    engine, answers, aborted, seeds = ready.core, {}, set(), itertools.count(1)
    for action in [*actions, None]:
        if isinstance(action, tuple):
            model, length, new, sampling, constrained, common = action
            seed = 3 if common else next(seeds)
            prompt = [3 + (seed * place * place + place) % 190 for place in range(length)]
            seq = sequence(ready, str(len(answers)), model, prompt, SamplingParams(max_tokens=new, **sampling))
            grammar = (
                ScriptedGrammar(lambda tokens: range(3 + len(tokens) % 2, 199, 2)) if constrained else None
            )
            engine.add(replace(seq, grammar=grammar))
            answers[seq.id] = []
        elif isinstance(action, int) and str(action) in answers:
            engine.abort(str(action))
            aborted.add(str(action))
        while action in (None, "step") and not engine.idle:
            for output in engine.step():
                answers[output.seq_id].append(output.token.id)
            if action == "step":
                break
    return {name: (tokens, name in aborted) for name, tokens in answers.items()}


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(st.one_of(REQUEST, st.just("step"), st.integers(0, 9)), min_size=1, max_size=30))
def test_every_answer_is_that_without_a_draft_model(
    replicas: tuple[Replica, Replica], actions: list[Any]
) -> None:
    """Adapters, blends, grammars, penalties, draws, chunks, preemption and aborts change no token."""
    drafting, plain = replicas
    found = run(drafting, actions)
    requests = [action for action in actions if isinstance(action, tuple)]
    expected = run(plain, requests)
    for name, (tokens, aborted) in found.items():
        assert tokens == (expected[name][0][: len(tokens)] if aborted else expected[name][0])
    left = drafting.core.inspect()
    assert not left.drafting
    assert [use.held for use in left.draft_blocks] == [{}]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "drawn"])
def test_drafts_hold(world: tuple[World, MemoryStore], sampling: dict[str, Any]) -> None:
    """Most drafts for the base hold, since a draft is drawn as the token is."""
    ready = load_drafting(world)
    run(ready, [("base", 8, 40, sampling, False, False)] * 3)
    stats = ready.core.stats
    assert stats.tokens_accepted > 0.7 * stats.tokens_drafted > 20


def test_a_draft_depends_on_the_tokens_alone(replicas: tuple[Replica, Replica]) -> None:
    """A draft behind tokens of which some were drafted before, read in parts, is that of one a step ahead that
    reads them first.
    """
    model, draw = draft_model(replicas[1], depth=0), random.Random(1)
    ahead = draft_model(replicas[1], depth=1)  # as on a GPU: a step begins before the last token is known
    for _ in range(5):
        seq, again = (Sequence("s", [5, 6, 7], SamplingParams(temperature=0.0)) for _ in range(2))
        for _ in range(12):
            rows = model.rows(seq)
            if rows > 4:
                model.catch_up({seq: rows - 2})
            [draft] = model.propose({seq: 4}).values()
            again.progress.tokens[:] = seq.progress.tokens
            assert ahead.rows(again)
            assert draft == ahead.propose({again: 4})[again]
            ahead.forget(again)
            new = [draw.randrange(3, 190) for _ in range(draw.choice([1, 1, 6]))]
            seq.progress.tokens += draft[: draw.randrange(5)] + new
        model.forget(seq)


def changed(base: Path, folder: Path, name: str, **fields: Any) -> Path:
    """Return a copy of a checkpoint whose file of JSON has other fields."""
    shutil.copytree(base, folder)
    (folder / name).write_text(json.dumps(json.loads((base / name).read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 198, "content": "<new>"}]}, "others for '<new>'"),
        ("tokenizer.json", {"model": None}, "none that can be read"),
        ("config.json", {"num_hidden_layers": 3}, "weights of the base"),
        ("config.json", {"architectures": ["Unknown"]}, "runtime.speculator: "),
        (None, {}, "runtime.speculator: "),
    ],
    ids=["other tokens", "no tokenizer", "larger", "not served", "no folder"],
)
def test_what_does_not_fit_is_refused(
    world: tuple[World, MemoryStore], tmp_path: Path, name: str, fields: Mapping[str, Any], expected: str
) -> None:
    """A build refuses a draft model by what it lacks."""
    base = world[0].base
    folder = changed(base, world[0].root / tmp_path.name, name, **fields) if name else tmp_path / "absent"
    with pytest.raises(Fault) as refused:
        world[0].build_with(MemoryStore(), runtime=speculator(folder))
    assert expected in f"{refused.value.message} {getattr(refused.value, 'findings', '')}"


def test_several_ranks_are_refused(world: tuple[World, MemoryStore]) -> None:
    """Several ranks are refused with what to set instead, and another draft model needs a restart."""
    with pytest.raises(SettingsInvalid, match=r"LORAMUX_TENSOR_PARALLEL=2: runtime\.speculator"):
        world[0].load(world[1], tensor_parallel=2)
    generation = current_generation(world[1], "tiny")
    assert "draft model" in str(needs_restart(generation, generation.model_copy(update={"speculator": None})))


@dataclass
class Machine:
    """A runner of depth 0 and a draft model: a step takes a second, and some of it for each row and draft."""

    row_s: float
    draft_s: float
    chance: float
    now_s: float = 0.0
    depth: int = 0
    noted: object = None
    read: dict[Sequence, int] = field(default_factory=dict)
    draw: random.Random = field(default_factory=lambda: random.Random(4))

    def submit(self, batch: Batch) -> Pending:
        """Draw numbers that come only once, so that prompt lookup finds nothing."""
        seqs = tuple(chunk.seq for chunk in batch.chunks for _ in range(chunk.drafted + 1))
        places = [len(c.seq.progress.tokens) + ahead for c in batch.chunks for ahead in range(c.drafted + 1)]
        self.now_s += 1.0 + self.row_s * (len(places) - len(batch.chunks))
        return Pending(seqs, lambda: [Token(place) for place in places], drafts=batch.drafts)

    def _took(self, rows: int, took_s: float) -> None:
        self.now_s += took_s
        self.noted(rows, took_s)

    def rows(self, seq: Sequence) -> int:
        return len(seq.progress.tokens) - self.read.get(seq, 0)

    def catch_up(self, lengths: Mapping[Sequence, int]) -> None:
        for seq, rows in lengths.items():
            self.read[seq] = self.read.get(seq, 0) + rows
        self._took(rows := sum(lengths.values()), self.draft_s * (1 + rows / 16))

    def propose(self, requested: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Return tokens that hold as often as they do here."""
        for place in range(max(requested.values())):
            self._took(sum(self.rows(seq) for seq in requested) if not place else len(requested), self.draft_s)
        self.read |= {seq: len(seq.progress.tokens) for seq in requested}
        return {
            seq: [
                len(seq.progress.tokens) + at if self.draw.random() < self.chance else 0 for at in range(count)
            ]
            for seq, count in requested.items()
        }

    def forget(self, seq: Sequence) -> None:
        self.read.pop(seq, None)


def speed(machine: Machine, streams: int, prompt: int) -> float:
    """Return how many times the tokens of steps without drafts come, of answers of 100 tokens."""
    limits = SchedulerLimits(4096, 64, max_adapters=2, max_seq_len=8192, speculative_tokens=8)
    choice = DraftChoice(machine, 8, clock=lambda: machine.now_s)
    blocks = BlockManager(8192, 16)
    engine = Engine(machine, limits, blocks, Residents(), clock=lambda: machine.now_s, lookup=choice)
    began_s, steps = 0.0, 0
    for answers in range(30):
        if answers == 10:
            began_s, steps = machine.now_s, 0
        for number in range(streams):
            prompt_ids = [10_000 + number * prompt + place for place in range(prompt)]
            engine.add(Sequence(f"{answers} {number}", prompt_ids, SamplingParams(max_tokens=100)))
        while not engine.idle:
            engine.step()
        steps += 100
    return steps / (machine.now_s - began_s)


@pytest.mark.parametrize(
    ("chance", "draft_s", "streams", "row_s", "prompt", "least"),
    cases(__file__, "GAINS"),
)
def test_drafts_gain_where_they_hold_and_never_cost(
    chance: float, draft_s: float, streams: int, row_s: float, prompt: int, least: float
) -> None:
    """Drafts gain where they are cheap and hold, and cost at most a fiftieth anywhere else."""
    assert speed(Machine(row_s, draft_s, chance), streams, prompt) > least
