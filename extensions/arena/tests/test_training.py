"""Checkpoints of a trainer that become versions of an adapter."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerControl, TrainerState, TrainingArguments

from loramux import PushAdapter
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.faults import RequestInvalid
from tests.arena_server import Versions, serving
from tests.support.openai_api import openai_world
from tests.support.services.operated_replicas import Built, open_builder


@pytest.fixture
def world(tmp_path: Path) -> Built:
    """A deployment with a tiny base."""
    return openai_world(tmp_path / "world")


def train(base: Path, folder: Path, callback: Any) -> None:
    """Train an adapter for two steps, of which each is saved."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    tokens = torch.arange(8)
    rows = [{"input_ids": tokens, "labels": tokens}] * 2
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, report_to=[], learning_rate=0.1, use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()


async def test_each_checkpoint_of_a_trainer_is_a_version(world: Built, tmp_path: Path) -> None:
    """A trainer's saves become generations with another digest each."""
    async with open_builder(world, tmp_path / "work") as builder:
        callback = PushAdapter("tiny", "trained", builder=builder)
        await asyncio.to_thread(train, world[0].base, tmp_path / "run", callback)
    assert [(each.step, each.promoted) for each in callback.pushed] == [(1, True), (2, True)]
    assert len({each.digest for each in callback.pushed}) == 2
    assert require_deployment(world[1], "tiny").adapters["trained"].digest == callback.pushed[1].digest


def at(step: int) -> tuple[TrainerState, TrainerControl]:
    return TrainerState(global_step=step, is_world_process_zero=True), TrainerControl()


@pytest.mark.parametrize(("likelihood", "promoted"), [(-1.0, True), (-2.0, True), (-3.0, False)])
async def test_a_version_that_is_worse_is_not_promoted(
    world: Built, tmp_path: Path, likelihood: float, promoted: bool
) -> None:
    """The candidate leaves the deployment, whatever came of it."""
    name, folder = next(iter(world[0].adapters.items()))
    examples = tmp_path / "examples.jsonl"
    examples.write_text(
        "".join(json.dumps({"text": f"ask {n}", "reference": "right"}) + "\n" for n in range(3))
    )
    candidate = f"{name}-candidate"
    service = Versions(lambda *_: "right", {name: -2.0, candidate: likelihood})
    before = require_deployment(world[1], "tiny").adapters[name].digest
    async with open_builder(world, tmp_path / "work") as builder, serving(service) as replica:
        callback = PushAdapter(
            "tiny", name, builder=builder, inference=replica, examples=examples, on="evaluate"
        )
        other = next(path for each, path in world[0].adapters.items() if path != folder)
        model = SimpleNamespace(
            save_pretrained=lambda into: [
                Path(into, path.name).write_bytes(path.read_bytes()) for path in other.iterdir()
            ]
        )
        state, control = at(7)
        await asyncio.to_thread(callback.on_evaluate, None, state, control, model=model)
    [pushed] = callback.pushed
    assert (pushed.step, pushed.promoted, pushed.failure) == (7, promoted, None)
    assert pushed.compared.difference == pytest.approx(likelihood + 2)
    adapters = require_deployment(world[1], "tiny").adapters
    assert candidate not in adapters
    assert (adapters[name].digest != before) == promoted


async def test_a_push_that_fails_does_not_end_a_training(tmp_path: Path) -> None:
    """The failure is a warning and stands in the list; other processes than the first push nothing."""
    callback = PushAdapter("tiny", "trained", builder="127.0.0.1:1")
    state, control = at(1)
    for first in (False, True):
        state.is_world_process_zero = first
        callback.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, control)
    full = PushAdapter("tiny", "trained", on="evaluate")
    model = SimpleNamespace(save_pretrained=Mock(side_effect=OSError("No space left on device")))
    full.on_evaluate(None, state, control, model=model)
    reasons = [each.failure.reason for each in callback.pushed + full.pushed]
    assert reasons == ["REQUEST_INVALID", "RESOURCES_EXHAUSTED"]


def test_examples_need_references(tmp_path: Path) -> None:
    """A file that cannot compare is refused before the training."""
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"prompt": "hello"}\n')
    with pytest.raises(RequestInvalid, match="1 of its lines are no examples"):
        PushAdapter("tiny", "trained", examples=examples)
