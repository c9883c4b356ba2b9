"""Adapters of all kinds together, one of each beside all others, against PEFT token for token in float32."""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from inference_service.adapters.changing import StoredBundles
from inference_service.core.adapter import ScaledAdapter
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import RequestInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models import test_own_vocabulary
from tests.models.conftest import Counted
from tests.models.test_merge import ready_of
from tests.support import tiny
from tests.support.service import open_service
from tests.support.thread_ranks import run_in_ranks

NEW = 10
CALLED = [5, 6]
Q, OTHERS = ["q_proj"], ["k_proj", "down_proj"]
DORA: dict[str, Any] = {
    "use_dora": True,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "rank_pattern": {"q_proj": 7},
    "alpha_pattern": {"up_proj": 3},
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "other": {"target_modules": OTHERS, "alpha_pattern": {"k_proj": 3}},
    "dora": DORA,
    "lora-bias": {"target_modules": OTHERS, "lora_bias": True},
    "biases": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "all-biases": {"target_modules": ["v_proj", "o_proj", "down_proj"], "bias": "all"},
    "called": {"target_modules": ["q_proj", "o_proj"], "alora_invocation_tokens": CALLED},
    "called-bias": {"target_modules": ["v_proj"], "lora_bias": True, "alora_invocation_tokens": CALLED},
}
OWN: dict[str, dict[str, Any]] = {
    "ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "head": {"target_modules": Q, "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": Q, "trainable_token_indices": [50, 3, 4]},
    "everything": DORA
    | {"bias": "lora_only", "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 60]},
}
"""Adapters with embeddings or a head; the last one with everything that goes together."""
SOME: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
DISGUISED: dict[str, Any] = {
    "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **SOME),
    "vera": peft.VeraConfig(r=5, **SOME),
    "loha": peft.LoHaConfig(r=2, alpha=5, **SOME),
    "miss": peft.MissConfig(r=5, **SOME),
}
UNTRAINED = "untrained"
"""IA3, whose scales are all 1."""
MIXED: dict[str, dict[str, float]] = {
    "plain*0.7+other*0.5": {"plain": 0.7, "other": 0.5},
    "plain*-0.5": {"plain": -0.5},
}
KINDS = (*LORA, *OWN, *DISGUISED)
MODELS = ("base", *KINDS, *MIXED)
APART = ("dora", "lora-bias", "biases", "all-biases", "called", "called-bias", "ia3", *OWN)
"""Those that no mixture has."""


def fresh(base: Path, config: Any) -> Any:
    """Return a model with an adapter; PEFT writes into the copy of its config."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.get_peft_model(model, copy.deepcopy(config))


def save(base: Path, folder: Path, config: Any, seed: int) -> Path:
    """Save an adapter that moved away from its initialisation."""
    model = fresh(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder


def peft_answers(world: tiny.World, requests: Sequence[tuple[str, list[int]]]) -> list[list[int]]:
    models = {name: tiny.oracle(world.base, world.adapters.get(name)) for name in ("base", *KINDS)}
    both = tiny.oracle(world.base, world.adapters["plain"])
    for name in ("plain", "other"):
        both.load_adapter(str(world.adapters[name]), name)
    for text, parts in MIXED.items():
        both.add_weighted_adapter(
            list(parts), list(parts.values()), text.replace(".", "_"), combination_type="cat"
        )
    found = []
    for name, prompt in requests:
        if name in MIXED:
            both.set_adapter(name.replace(".", "_"))
        found.append(tiny.oracle_tokens(models.get(name, both), prompt, NEW))
    return found


def records(store: MemoryStore) -> dict[str, AdapterRecord]:
    generation = current_generation(store, "tiny")
    return generation.adapters


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tiny.Answers:
    root = tmp_path_factory.mktemp("kinds")
    base = root / "base"
    tiny.make_checkpoint(base, Qwen2Config(**tiny.SIZES))
    for seed, (name, settings) in enumerate(LORA.items()):
        tiny.make_adapter(base, root / name, seed, r=4, lora_alpha=9, **settings)
    for seed, (name, settings) in enumerate(OWN.items()):
        test_own_vocabulary.make(base, root / name, seed, **settings)
    for seed, (name, config) in enumerate(DISGUISED.items()):
        save(base, root / name, config, seed)
    fresh(base, DISGUISED["ia3"]).save_pretrained(root / UNTRAINED)
    world = tiny.World(base, {name: root / name for name in (*KINDS, UNTRAINED)}, root)
    draw = random.Random(5)
    requests = []
    for name in MODELS:
        prompt = draw.choices([*range(10, tiny.VOCAB), 3, 4, 50, 60], k=draw.choice([9, 17, 30]))
        prompt[(at := draw.randrange(7)) : at + 2] = CALLED
        requests.append((name, prompt))
    return tiny.Answers(world, world.built(), requests, peft_answers(world, requests))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_all_kinds_in_one_batch_equal_peft(answers: tiny.Answers, counted: Counted, backend: str) -> None:
    """All kinds answer as PEFT beside the base and blends, in chunks, with prefixes, alone, and preempted."""
    settings: dict[str, Any] = {"native": backend == "native", "block_size": 4, "max_batch_tokens": 48}
    ready = answers.world.load(answers.store, **settings)
    for situation in ("mixed batch", "prefix hits"):
        counted("kinds", backend, situation, tiny.run_engine(ready, answers.requests, NEW), answers.expected)
    assert ready.engine.stats.prefix_tokens_hit > 0
    alone = [tiny.run_engine(ready, [request], NEW)[0] for request in answers.requests]
    counted("kinds", backend, "alone", alone, answers.expected)
    as_base = tiny.run_engine(ready, [("base", prompt) for _, prompt in answers.requests[1:]], NEW)
    assert all(found != base for found, base in zip(answers.expected[1:], as_base, strict=True))
    small = answers.world.load(answers.store, kv_memory_gb=96 * 2 * 2 * 2 * 8 * 4 / 1e9, **settings)
    counted("kinds", backend, "preemption", tiny.run_engine(small, answers.requests, NEW), answers.expected)
    assert small.engine.stats.preemptions > 0


def test_two_ranks_answer_the_same(answers: tiny.Answers, counted: Counted) -> None:
    """Two ranks answer as PEFT for all kinds: magnitudes, biases and own tables count once."""
    settings: dict[str, Any] = {"block_size": 4, "max_batch_tokens": 48, "speculative_tokens": 2}
    settings["preload"] = len(answers.world.adapters)  # ranks have what is resident before they begin
    ready = answers.world.load(answers.store, **settings)
    with run_in_ranks(ready, answers.world.base, answers.store) as ranks:
        for situation in ("mixed batch", "prefix hits"):
            counted(
                "kinds", "2 ranks", situation, tiny.run_engine(ranks, answers.requests, NEW), answers.expected
            )
    small = answers.world.load(answers.store, kv_memory_gb=96 * 2 * 2 * 2 * 8 * 4 / 1e9, **settings)
    with run_in_ranks(small, answers.world.base, answers.store) as ranks:
        counted(
            "kinds", "2 ranks", "preemption", tiny.run_engine(ranks, answers.requests, NEW), answers.expected
        )
        assert ranks.core.stats.preemptions > 0


def test_an_adapter_is_called_what_it_is(answers: tiny.Answers) -> None:
    """A replica names each adapter's kind, also of an untrained one, and counts the rows that it replaces."""
    ready = answers.world.load(answers.store)
    found = {model.name: model for model in ready.service.local.catalog}
    assert {name: model.kinds for name, model in found.items()} == {
        "base": (),
        "plain": ("lora",),
        "other": ("lora",),
        "dora": ("dora",),
        "lora-bias": ("lora", "bias"),
        "biases": ("lora", "bias"),
        "all-biases": ("lora", "bias"),
        "called": ("lora", "activated"),
        "called-bias": ("lora", "bias", "activated"),
        "ends": ("lora", "embedding", "head"),
        "head": ("lora", "head"),
        "tokens": ("lora", "embedding"),
        "everything": ("dora", "embedding", "head"),
        **{name: (name,) for name in DISGUISED},
        UNTRAINED: ("ia3",),
    }
    assert dict(found["everything"].replaced) == {"embedding": 2, "head": tiny.VOCAB}
    assert found["called"].invocation == tuple(CALLED)
    assert tiny.run_engine(ready, [(UNTRAINED, [9, 8, 7])], 4) == tiny.run_engine(
        ready, [("base", [9, 8, 7])], 4
    )


def of_kinds(answers: tiny.Answers, *names: str) -> tuple[list[tuple[str, list[int]]], list[list[int]]]:
    """Return the requests of some models, and their answers."""
    pairs = zip(answers.requests, answers.expected, strict=True)
    requests, expected = zip(*(pair for pair in pairs if pair[0][0] in names), strict=True)
    return list(requests), list(expected)


@pytest.mark.parametrize("name", ["dora", "biases", "lora-bias"])
def test_merged_weights_and_biases_equal_peft(answers: tiny.Answers, name: str) -> None:
    """Merged weights equal PEFT, with biases where the base has none too."""
    requests, expected = of_kinds(answers, name)
    ready = ready_of(answers.world, name, {"serve_base": False})
    assert ready.service.local.catalog.get(name).adapter is None
    assert tiny.run_engine(ready, requests, NEW) == expected


@pytest.mark.parametrize("turned", [1, pytest.param(5, marks=pytest.mark.sweep)])
async def test_a_name_of_another_kind_answers_as_that_one(
    answers: tiny.Answers, turned: int, tmp_path: Path
) -> None:
    """Names are given to adapters of other kinds in turn, each loaded through a disk when it is asked for."""
    on_disk = {"preload": 0, "adapter_disk_gb": 0.1, "cache_dir": tmp_path, "native": False}
    service = await open_service((answers.world, answers.store), **on_disk)
    generation = current_generation(answers.store, "tiny")
    assert generation is not None
    prompts = dict(answers.requests)
    expected = dict(zip(prompts, answers.expected, strict=True))
    for name in KINDS[::2]:
        assert await service.answers(prompts[name], model=name, max_tokens=NEW, ignore_eos=True) == [
            expected[name]
        ]
    now = dict(zip(KINDS, [*KINDS[turned:], *KINDS[:turned]], strict=True))
    records = {name: generation.adapters[other] for name, other in now.items()}
    service.ready.adapters.apply(generation.model_copy(update={"adapters": records, "number": 2}))
    for name, other in now.items():
        assert await service.answers(prompts[other], model=name, max_tokens=NEW, ignore_eos=True) == [
            expected[other]
        ]
    await service.close()


def test_mixtures_are_of_plain_adapters(answers: tiny.Answers) -> None:
    """Others are refused by name in both forms of a request, unless scales make each itself or leave it out."""
    catalog = answers.world.load(answers.store, preload=0).service.local.catalog
    for name in APART:
        text = rf"adapters that can be scaled; this one (is DoRA|acts from|has embeddings).*, found {name}"
        for parts in ([ScaledAdapter(name, 0.5)], [ScaledAdapter("plain"), ScaledAdapter(name)]):
            with pytest.raises(RequestInvalid, match=text):
                catalog.mix(parts, where="adapters")
            with pytest.raises(RequestInvalid, match=text):
                catalog.resolve("+".join(f"{part.name}*{part.scale}" for part in parts))
        for request in (f"{name}*1.0", f"{name}*0.5+{name}*0.5", f"{name}+plain*0"):
            assert catalog.resolve(request) is catalog.get(name)
        assert catalog.resolve(f"{name}*0+plain") is catalog.get("plain")


def test_what_is_cut_keeps_the_rows_of_its_own(answers: tiny.Answers) -> None:
    """Rows of embeddings and head are not of the matrices that a rank is cut in, and stay as they are."""
    world = replace(
        answers.world, adapters={name: answers.world.adapters[name] for name in ("head", "everything")}
    )
    store = world.built(truncate_to_rank=2)
    for name, record in records(store).items():
        cut = read_bundle(store, record.digest)
        whole = read_bundle(answers.store, records(answers.store)[name].digest)
        assert cut.manifest.ranks == (2,)
        assert cut.manifest.replaced == whole.manifest.replaced
        assert np.array_equal(cut.vocabulary, whole.vocabulary)


async def test_a_bundle_by_its_digest_is_what_a_generation_says_of_it(answers: tiny.Answers) -> None:
    """A bundle that one replica loaded by its digest has the invocation of its generation."""
    bundles = StoredBundles(answers.store)
    for stated in records(answers.store).values():
        found = await bundles.record(stated.digest)
        assert (found.invocation_tokens, found.summary) == (stated.invocation_tokens, stated.summary)
