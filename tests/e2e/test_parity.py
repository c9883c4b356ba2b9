"""The demo's model and adapters through builder, store and engine, against transformers and PEFT in float32.

Four of twenty prompts and 20 tokens, which fill a block of the cache; with ``--sweep`` all of them and 64.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from builder_service.pipeline.build import build
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.progress import Progress
from inference_service.startup.load import Ready, load
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.storage.local import LocalStore
from loramux_shared.storage.open import open_store
from tests.e2e.real import EXAMPLES, deployment, in_float32, oracle_answers, prompts
from tests.support.once import made_once
from tests.support.s3_gateway import S3Server
from tests.support.tiny import run_engine

pytestmark = pytest.mark.timeout(400)
MIXED = 8


@pytest.fixture(scope="module")
def sweeps(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--sweep"))


@pytest.fixture(scope="module")
def asked(sweeps: bool) -> list[list[int]]:
    return prompts(Path(deployment().build.checkpoint_repository.repo), every=1 if sweeps else 5)


@pytest.fixture(scope="module")
def expected(
    asked: list[list[int]], sweeps: bool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[list[int]]]:
    def write(path: Path) -> None:
        path.write_text(json.dumps(oracle_answers(deployment(), asked, 64 if sweeps else 20)))

    answers: dict[str, list[list[int]]] = json.loads(made_once(tmp_path_factory, "oracle", write).read_text())
    return answers


def _ready(store: Store) -> Ready:
    """Build the demo's deployment in float32 into a store, and load it from there."""
    wanted = in_float32(deployment())
    base = Path(wanted.build.checkpoint_repository.repo)
    roots = (EXAMPLES, base)
    build(wanted, BuildContext(store, open_sources(local_roots=roots)), Progress(wanted.build.lora_adapters))
    settings = InferenceSettings(
        deployment=wanted.model_name, dtype="float32", local_roots=roots, kv_memory_gb=0.2, prefix_cache=False
    )
    return load(settings, store)


def _mixed_batches(
    ready: Ready, asked: Sequence[Sequence[int]], expected: dict[str, list[list[int]]], most: int | None = None
) -> None:
    """Every model meets every prompt, eight at a time, base and adapters side by side; of so many batches."""
    models = list(expected)
    pairs = [
        (models[(place + turn) % len(models)], place)
        for turn in range(len(models))
        for place in range(len(asked))
    ]
    for start in range(0, len(pairs), MIXED)[:most]:
        batch = pairs[start : start + MIXED]
        assert len({model for model, _ in batch}) == len(models)
        new = len(expected[batch[0][0]][0])
        answers = run_engine(ready, [(model, asked[place]) for model, place in batch], new)
        for (model, place), answer in zip(batch, answers, strict=True):
            assert answer == expected[model][place], (model, place)


def test_mixed_batches_and_each_alone_equal_peft(
    tmp_path: Path, asked: list[list[int]], expected: dict[str, list[list[int]]], sweeps: bool
) -> None:
    """In batches of eight that mix base and adapters every token is PEFT's, and one request at a time, each
    with a prompt of its own, or with all."""
    ready = _ready(LocalStore(tmp_path))
    _mixed_batches(ready, asked, expected)
    for number, (model, answers) in enumerate(expected.items()):
        for place in range(len(asked)) if sweeps else [number % len(asked)]:
            answer = run_engine(ready, [(model, asked[place])], len(answers[place]))[0]
            assert answer == answers[place], (model, place)


def test_bundles_from_an_s3_server_give_the_same_tokens(
    s3_server: S3Server,
    asked: list[list[int]],
    expected: dict[str, list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    sweeps: bool,
) -> None:
    """Built into and read from a real S3 server, every token of a mixed batch is PEFT's."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    ready = _ready(open_store(f"s3://{s3_server.new_bucket()}/loramux"))
    _mixed_batches(ready, asked, expected, None if sweeps else 1)
