"""Vectors of texts, through the engine alone."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import EndReason, Vector
from loramux_shared.runtime import Pooling
from tests.support.tiny import Replica, World, oracle, run_sequences, sequence

Query = tuple[str, list[int], Pooling]


@cache
def cached_oracle(base: Path, adapter: Path | None) -> Any:
    """The model as transformers and PEFT run it, made once."""
    return oracle(base, adapter)


def states(world: World, model: str, prompt: Sequence[int]) -> torch.Tensor:
    """Return the ``AutoModel(...).last_hidden_state`` of transformers for a prompt, under PEFT's adapter."""
    whole = cached_oracle(world.base, world.adapters.get(model))
    inner = whole.get_base_model() if model in world.adapters else whole
    with torch.no_grad():
        return inner.model(torch.tensor([list(prompt)])).last_hidden_state[0]


def expected_of(world: World, model: str, prompt: Sequence[int], pooling: Pooling) -> Vector:
    hidden = states(world, model, prompt)
    return (hidden[-1] if pooling is Pooling.LAST else hidden.double().mean(0).float()).numpy()


def run_pooled(
    ready: Replica,
    requests: Sequence[Query],
    answering: Sequence[str] = (),
    prompt: Sequence[int] = (),
    new: int = 6,
) -> tuple[list[Vector], list[list[int]]]:
    """Run requests for vectors through the engine, beside answers of some models to a prompt."""
    params = SamplingParams(max_tokens=new)
    answers = [sequence(ready, f"answer {model}", model, prompt, params) for model in answering]
    pooled = [
        replace(sequence(ready, str(number), model, text, SamplingParams(max_tokens=0)), pooling=pooling)
        for number, (model, text, pooling) in enumerate(requests)
    ]
    outputs = run_sequences(ready, answers + pooled)
    stats = ready.core.stats
    assert stats.blocks_free == stats.blocks_total
    vectors = []
    for each in pooled:
        [output] = outputs[each.id]
        assert output.finish is EndReason.LENGTH
        assert output.pooled is not None
        vectors.append(output.pooled)
    return vectors, [[output.token.id for output in outputs[each.id]] for each in answers]
