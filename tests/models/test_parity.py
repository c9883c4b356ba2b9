"""Long greedy answers of every family against transformers and PEFT in float32, in every situation; counted.

``pytest --sweep tests/models/test_parity.py --parity docs/reference/parity.json`` writes the counts
down, and `make docs` puts them into docs/reference/models.md.
"""

import random
from dataclasses import dataclass

import pytest

from loramux_shared.bases.read import read_config
from loramux_shared.faults import SettingsInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.conftest import Counted
from tests.models.test_families import CASES, tight
from tests.support.tiny import VOCAB, Replica, World, make_world_of, oracle, oracle_tokens, run_engine

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(1200)]
NEW = 64
CHECKED = 8
CROWD = 32
LENGTHS = (57, 40, 33, 1, 17, 16, 64, 26)
"""Tokens of the prompts that are checked: around blocks of 8 and 16, chunks of 16, and windows of 24."""


@dataclass(frozen=True)
class Query:
    """A world, requests, and what transformers and PEFT answer to the first of them."""

    architecture: str
    world: World
    store: MemoryStore
    requests: list[tuple[str, list[int]]]
    expected: list[list[int]]

    def load(self, backend: str, **settings: object) -> Replica:
        """A replica, or a skipped test where there is no compiler."""
        try:
            return self.world.load(self.store, backend=backend, **settings)
        except SettingsInvalid as fault:
            pytest.skip(fault.message)


@pytest.fixture(scope="module", params=CASES)
def query(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Query:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("parity")
    world = make_world_of(folder, case.config, case.adapters, max_seq_len=case.max_seq_len)
    draw = random.Random(11)
    models = ("base", *case.adapters)
    lengths = [*LENGTHS, *(draw.randrange(1, 64) for _ in range(CROWD - CHECKED))]
    longest = read_config(world.base, case.max_seq_len).max_positions - NEW
    requests = [
        (models[index % len(models)], [draw.randrange(3, VOCAB) for _ in range(length)])
        for index, length in enumerate(min(max(case.shortest, length), longest) for length in lengths)
    ]
    oracles = {name: oracle(world.base, world.adapters.get(name)) for name in models}
    expected = [oracle_tokens(oracles[name], prompt, NEW) for name, prompt in requests[:CHECKED]]
    return Query(read_config(world.base).architecture, world, world.built(), requests, expected)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_alone(query: Query, backend: str, counted: Counted) -> None:
    """Each request runs alone."""
    ready = query.load(backend, prefix_cache=False)
    found = [run_engine(ready, [request], NEW)[0] for request in query.requests[:CHECKED]]
    counted(query.architecture, backend, "alone", found, query.expected)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(("situation", "max_batch_tokens"), [("among 31", 1024), ("in chunks", 16)])
def test_among_others(
    query: Query, backend: str, situation: str, max_batch_tokens: int, counted: Counted
) -> None:
    """Base and adapters of 32 requests in one batch, prompts whole or in chunks."""
    ready = query.load(backend, max_batch_tokens=max_batch_tokens)
    found = run_engine(ready, query.requests, NEW)[:CHECKED]
    counted(query.architecture, backend, situation, found, query.expected)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_preempted_and_from_prefixes(query: Query, backend: str, counted: Counted) -> None:
    """Answers are the same in a cache too small for all, and from the prefix of an earlier one."""
    blocks = {"block_size": 16 if backend == "native" else 8}
    settings = tight(query.world, CHECKED, least=144) | blocks
    if query.architecture == "Gemma2ForCausalLM":  # two groups of layers: more tokens of as many bytes
        settings["kv_memory_gb"] *= 0.75
    ready = query.load(backend, **settings)
    found = run_engine(ready, query.requests[:CHECKED], NEW)
    counted(query.architecture, backend, "preempted", found, query.expected)
    assert ready.engine.stats.preemptions > 0
    ready = query.load(backend, **blocks)
    for request, expected in zip(query.requests[:CHECKED], query.expected, strict=True):
        run_engine(ready, [request], NEW)
        counted(query.architecture, backend, "prefix hit", run_engine(ready, [request], NEW), [expected])
    assert ready.engine.stats.prefix_tokens_hit > 0


def test_the_kernels_for_gpus(query: Query, counted: Counted) -> None:
    """Kernels run in the interpreter, so with fewer and shorter requests."""
    new, some = 8, slice(2, 6)
    ready = query.load("triton", max_batch_tokens=32)
    found = run_engine(ready, query.requests[some], new)
    expected = [answer[:new] for answer in query.expected[some]]
    counted(query.architecture, "triton", "in chunks", found, expected)
