"""An adapter that makes NaN, in random traffic: other requests get the same answers as without."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3_5TextConfig

from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.driver.engine_thread import Inbox
from inference_service.startup import load
from inference_service.startup.bank import OpenBank, preload
from loramux_shared.runtime import Pooling
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_families import PARTS, SETS
from tests.support.steps import engine_without_time
from tests.support.tiny import ADAPTERS, SIZES, VOCAB, Replica, World, make_world_of, sequence

BAD = "bad"
REQUESTS = 48
TIMES = 1e12
"""Factor of A and of B: finite in every type, while products of queries and keys are not."""
FAMILIES: dict[str, tuple[PreTrainedConfig, dict[str, dict[str, Any]]]] = {
    "llama": (LlamaConfig(**SIZES), ADAPTERS | {BAD: ADAPTERS["all"]}),
    "windows": (MistralConfig(**SIZES, sliding_window=24), ADAPTERS | {BAD: ADAPTERS["all"]}),
    "states": (
        Qwen3_5TextConfig(**SIZES | PARTS["qwen_delta"], pad_token_id=0),
        SETS["delta"] | {BAD: SETS["delta"]["all"]},
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def stores(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, list[MemoryStore]]:
    """Return a world, built twice: with the adapter as trained, and with one that makes NaN."""
    world, stores = make_world_of(tmp_path_factory.mktemp("poisoned"), *FAMILIES[request.param]), []
    for times in (1.0, TIMES):
        _multiply(world.adapters[BAD] / "adapter_model.safetensors", times)
        stores.append(MemoryStore())
        world.build(stores[-1])
    return world, stores


def _multiply(file: Path, times: float) -> None:
    save_file({name: tensor * times for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters have the same slots in every replica: torch's sums have their order."""

    def one_by_one(bank: OpenBank, adapters: Iterable[Adapter], inbox: Inbox) -> None:
        for adapter in adapters:
            preload(bank, [adapter], inbox)

    monkeypatch.setattr(load, "preload", one_by_one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16"},
        {"native": False, "prefix_cache": False},
        {"native": False, "prefix_cache": False, "dtype": "bfloat16"},
        {"deterministic": True},
    ],
    ids=["compiled", "compiled, bfloat16", "torch", "torch, bfloat16", "deterministic"],
)
def test_it_reaches_no_answer_of_others(
    stores: tuple[World, list[MemoryStore]], settings: dict[str, Any]
) -> None:
    """Bit for bit: tokens, log probabilities and vectors; all but torch find prefixes, and share blocks."""
    world, every = stores
    small = {"max_batch_tokens": 24, "max_batch_seqs": 8, "kv_memory_gb": 0.0008} | settings
    healthy, beside = [_answers(world.load(store, build=engine_without_time(), **small)) for store in every]
    bad = {key: one for key, one in beside.items() if BAD in key}
    assert set(map(str, bad.values())) == {"['NUMERICS']"}
    assert {key: one for key, one in beside.items() if BAD not in key} == {
        key: one for key, one in healthy.items() if BAD not in key
    }


Found = dict[str, list[Any]]


def _answers(ready: Replica) -> Found:
    """Return the answers of all models to overlapping requests; the bad one's are short."""
    engine = ready.core
    found: Found = {}
    coming, draw = list(_requests(ready)), random.Random(1)
    while coming or not engine.idle:
        while coming and (engine.idle or draw.random() < 0.4):
            seq = coming.pop(0)
            found[seq.id] = []
            engine.add(seq)
        for output in engine.step():
            if output.fault is not None:
                found[output.seq_id].append(output.fault.reason)
            elif output.pooled is not None:
                found[output.seq_id] += output.pooled.tolist()
            elif output.token is not None:
                found[output.seq_id] += [output.token.id, output.token.logprob]
    return found


def _requests(ready: Replica) -> Iterator[Sequence]:
    draw = random.Random(2)
    models = ["base", *ready.generation.adapters]
    prefixes = [[draw.randrange(3, VOCAB) for _ in range(40)] for _ in range(2)]
    for number in range(REQUESTS):
        model = BAD if number % 4 == 1 else draw.choice(models)
        mixed = f"all*0.5+{BAD}*0.5" if number % 12 == 5 else model
        prompt = draw.choice(prefixes)[: draw.randrange(41)]
        prompt += [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 24))]
        sampling = SamplingParams(
            max_tokens=1 if BAD in mixed else draw.randrange(1, 12),
            logprobs=1,
            temperature=draw.choice([0.0, 1.0]),
            seed=number,
        )
        seq = sequence(ready, f"{number} {mixed}", mixed, prompt, sampling)
        if number % 6 == 0:
            kind = draw.choice([Pooling.LAST, Pooling.MEAN])
            seq = replace(seq, sampling=SamplingParams(max_tokens=0), pooling=kind)
        yield seq
