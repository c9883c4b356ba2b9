"""An arena with a tiny real model, compared with transformers and PEFT."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from loramux_arena.contest import Contest
from loramux_arena.kept import AnswerFile
from loramux_arena.plan import Plan
from loramux_arena.questions import Question
from loramux_arena.standings import standings
from loramux_shared.storage.memory import MemoryStore
from tests.support.grpc_api import open_client
from tests.support.tiny import World, oracle

QUESTIONS = [
    Question(str(number), f"Once upon {number}", reference=text)
    for number, text in enumerate((" a time, there was", "!", " THE END"))
]


def expected(world: World, model: str) -> list[float]:
    """The log probability per token of each reference behind its question."""
    tokenizer = Tokenizer.from_file(str(world.base / "tokenizer.json"))
    found = []
    for question in QUESTIONS:
        begin, whole = (
            tokenizer.encode(text).ids
            for text in (question.as_text, question.as_text + (question.reference or ""))
        )
        with torch.no_grad():
            logits = oracle(world.base, world.adapters.get(model))(torch.tensor([whole])).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        own = [float(logprobs[place - 1, whole[place]]) for place in range(len(begin), len(whole))]
        found.append(sum(own) / len(own))
    return found


async def hold(
    world: tuple[World, MemoryStore], path: Path, models: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Have versions find out how likely the references are; return that, and answer a little."""
    ready = world[0].load(world[1], stream_interval_ms=0)
    ready.engine.start()
    plan = Plan(tuple(models), models[0], max_tokens=3, likelihood=True)
    try:
        async with open_client(ready) as client:
            with AnswerFile(path) as retained:
                contest = Contest(client, plan, QUESTIONS, retained)
                await contest.meet()
                await contest.answer()
                await contest.score_likelihoods()
    finally:
        await ready.engine.stop()
    report = standings(plan, QUESTIONS, contest.found)
    assert report.failures == ()
    assert [row.answers for row in report.standings] == [len(QUESTIONS)] * len(models)
    return {model: dict(values) for model, values in report.scores[0].values.items()}


async def test_likelihoods_are_those_of_transformers(world: tuple[World, MemoryStore], tmp_path: Path) -> None:
    """Likelihoods of the base and of an adapter.

    A blend of it alone is the adapter, and half of it lies elsewhere.
    """
    models = ["base", "all", "all*0.5+all*0.5", "all*0.5"]
    found = await hold(world, tmp_path / "kept", models)
    for model in ("base", "all"):
        assert list(found[model].values()) == pytest.approx(expected(world[0], model), abs=1e-4)
    assert found["all*0.5+all*0.5"] == pytest.approx(found["all"], abs=1e-5)
    assert all(abs(found["all*0.5"][name] - found["all"][name]) > 1e-3 for name in found["all"])
