"""The demo's model and adapters through builder, store and engine, against transformers and PEFT in float32.

Four of twenty prompts and 12 tokens, which end a block of the cache and begin another; with ``--sweep`` all of
them and 64.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.storage.open import open_store
from tests.e2e.real import EXAMPLES, Answers, deployment, in_float32, oracle_choices, prompts
from tests.support.s3_gateway import S3Server
from tests.support.tiny import Replica, load_replica, run_engine

pytestmark = pytest.mark.whole
MIXED = 8


@pytest.fixture(scope="module")
def sweeps(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--sweep"))


@pytest.fixture(scope="module")
def new(sweeps: bool) -> int:
    """The number of tokens of each answer."""
    return 64 if sweeps else 12


@pytest.fixture(scope="module")
def query(sweeps: bool) -> list[list[int]]:
    return prompts(Path(deployment().build.checkpoint_repository.repo), every=1 if sweeps else 5)


@pytest.fixture(scope="module")
def ready(s3_server: S3Server) -> Iterator[Replica]:
    """The demo's deployment in float32, built into a real S3 server and read from it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        yield _ready(open_store(f"s3://{s3_server.new_bucket()}/loramux"))


@pytest.fixture(scope="module")
def answers(ready: Replica, query: list[list[int]], new: int) -> Answers:
    """Every model's answers to every prompt, eight at a time."""
    return _mixed_batches(ready, query, new)


def _ready(store: Store) -> Replica:
    """Build the demo's deployment in float32 into a store, and load it from there."""
    required = in_float32(deployment())
    base = Path(required.build.checkpoint_repository.repo)
    roots = (EXAMPLES, base)
    build(
        required, BuildContext(store, open_sources(local_roots=roots)), Progress(required.build.lora_adapters)
    )
    settings = InferenceSettings(
        deployment=required.model_name, dtype="float32", local_roots=roots, kv_memory_gb=0.2, prefix_cache=False
    )
    return load_replica(settings, store)


def _models() -> list[str]:
    found = deployment()
    return [found.served_model_name, *found.build.lora_adapters]


def _mixed_batches(ready: Replica, query: Sequence[Sequence[int]], new: int) -> Answers:
    """Every model meets every prompt, eight at a time, base and adapters side by side."""
    models = _models()
    pairs = [
        (models[(place + turn) % len(models)], place)
        for turn in range(len(models))
        for place in range(len(query))
    ]
    answers: Answers = {}
    for start in range(0, len(pairs), MIXED):
        batch = pairs[start : start + MIXED]
        assert len({model for model, _ in batch}) == len(models)
        emitted = run_engine(ready, [(model, query[place]) for model, place in batch], new)
        answers |= dict(zip(batch, emitted, strict=True))
    assert {len(answer) for answer in answers.values()} == {new}
    return answers


def test_mixed_batches_equal_peft(query: list[list[int]], answers: Answers) -> None:
    """Every token is PEFT's choice in batches of eight that mix base and adapters."""
    assert len(answers) == len(_models()) * len(query)
    assert answers == oracle_choices(deployment(), query, answers)
    stated = {name: [answers[name, place] for place in range(len(query))] for name in _models()}
    assert len({str(each) for each in stated.values()}) == len(stated)  # every adapter changes something


def test_each_alone_is_as_in_a_batch(
    ready: Replica, query: list[list[int]], answers: Answers, sweeps: bool
) -> None:
    """A request alone gets the same tokens, with one prompt per model or (in a sweep) all prompts."""
    for number, model in enumerate(_models()):
        for place in range(len(query)) if sweeps else [number % len(query)]:
            expected = answers[model, place]
            assert run_engine(ready, [(model, query[place])], len(expected)) == [expected], (model, place)
