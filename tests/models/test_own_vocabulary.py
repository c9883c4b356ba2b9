"""Adapters with embeddings and a head of their own, token for token against PEFT in float32."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GraniteConfig, LlamaConfig

from inference_service.adapters.loader import Packer
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.lora.segments import Segment
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.reader import read_bundle, read_manifest
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import SIZES, VOCAB, World, make_checkpoint, oracle, oracle_tokens, run_engine

NEW = 12
FEW = [5, 6, 7, 50, 198]
Q = ["q_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "factors": {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 7}},
    "saved": {"target_modules": ["lm_head"], "use_rslora": True, "modules_to_save": ["embed_tokens"]},
    "some": {"target_modules": Q, "modules_to_save": ["lm_head", "embed_tokens"], "touched": FEW},
    "tokens": {"target_modules": Q, "trainable_token_indices": [50, 3, 4, 100, 120]},
    "apart": {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7, 60]}},
}
OF_TIED: dict[str, dict[str, Any]] = {
    "dora": {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True, "use_rslora": True},
    "both": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "one": {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
MODELS = ("base", *ADAPTERS)


def make(base: Path, folder: Path, seed: int, touched: list[int] | None = None, **config: Any) -> None:
    """Save an adapter with random factors and rows; of matrices that are saved whole only some are touched."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(loaded, LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.copy_(parameter * (1 + noise * 0.3))
            elif "lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(noise * 0.2)
            elif "modules_to_save" in name:
                rows = range(len(noise)) if touched is None else touched
                parameter[list(rows)] += noise[list(rows)] * 0.5
    model.save_pretrained(folder)


def made(root: Path, config: Any, adapters: Mapping[str, Mapping[str, Any]]) -> World:
    make_checkpoint(root / "base", config)
    for seed, (name, settings) in enumerate(adapters.items()):
        make(root / "base", root / name, seed, **settings)
    return World(root / "base", {name: root / name for name in adapters}, root)


def requests_of(models: tuple[str, ...]) -> list[tuple[str, list[int]]]:
    """Two prompts for each model; every second token has rows of its own in some adapters."""
    own = [3, 4, 5, 6, 7, 50, 60, 100, 120, 198]
    return [
        (name, [own[at % 10] if at % 2 else 3 + (at * 17 + place * 5) % 190 for at in range(3 + 9 * place)])
        for place in (0, 2)
        for name in models
    ]


def answers(world: World, requests: list[tuple[str, list[int]]]) -> list[list[int]]:
    models = {name: oracle(world.base, world.adapters.get(name)) for name in dict(requests)}
    return [oracle_tokens(models[name], prompt, NEW) for name, prompt in requests]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("own"), LlamaConfig(**SIZES), ADAPTERS)


REQUESTS = requests_of(MODELS)


def test_rows_that_do_not_differ_are_not_kept(world: World, store: MemoryStore) -> None:
    """A bundle has the touched rows of a matrix that was saved whole; rows of tokens are in order of ids."""
    generation = current_generation(store, "tiny")
    retained = {
        name: {part.module: part.tokens for part in read_manifest(store, record.digest).replaced}
        for name, record in generation.adapters.items()
    }
    runs = ((5, 3), (50, 1), (198, 1))
    assert retained == {
        "plain": {},
        "factors": {},
        "saved": {"embedding": ((0, VOCAB),)},
        "some": {"embedding": runs, "head": runs},
        "tokens": {"embedding": ((3, 2), (50, 1), (100, 1), (120, 1))},
        "apart": {"embedding": ((3, 1), (5, 1)), "head": ((7, 1), (60, 1))},
    }


def test_log_probabilities_of_a_prompt_are_those_of_its_own_head(world: World, store: MemoryStore) -> None:
    """A scored prompt goes through the head of its adapter, not through the base's."""
    prompt = REQUESTS[-1][1]
    ready = world.load(store)
    engine = ready.core
    adapter = ready.service.local.catalog.get("factors").adapter
    engine.add(Sequence("scored", list(prompt), SamplingParams(max_tokens=1, prompt_logprobs=0), adapter))
    scores = [token.logprob for output in engine.step() for token in output.prompt[1:]]
    logits = oracle(world.base, world.adapters["factors"])(torch.tensor([prompt])).logits[0]
    required = torch.log_softmax(logits, -1)[range(len(prompt) - 1), prompt[1:]]
    assert torch.allclose(torch.tensor(scores), required, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**(SIZES | {"tie_word_embeddings": True})),
        pytest.param(
            Gemma3TextConfig(**(SIZES | {"tie_word_embeddings": True, "head_dim": 16})), marks=pytest.mark.sweep
        ),
        pytest.param(
            GraniteConfig(**(SIZES | {"logits_scaling": 3.0, "embedding_multiplier": 2.5})),
            marks=pytest.mark.sweep,
        ),
    ],
    ids=["tied", "scaled embeddings", "divided logits"],
)
def test_other_bases_equal_peft(tmp_path: Path, config: Any) -> None:
    """Tied tables work as in PEFT, and scales of embeddings and logits are applied."""
    adapters = ADAPTERS | (OF_TIED if config.tie_word_embeddings else {})
    world = made(tmp_path, config, adapters)
    requests = requests_of(("base", *adapters))
    assert run_engine(world.load(world.built()), requests, NEW) == answers(world, requests)


def test_a_slot_that_was_left_has_no_tables(world: World, store: MemoryStore) -> None:
    """A slot that an adapter left has neither its embeddings nor its head for the next one."""
    ready = world.load(store)
    adapter = ready.service.local.catalog.get("factors").adapter
    lora, slot = ready.bank.lora, adapter.slot
    rows = [Segment(slot, 0, 2)]
    assert lora.vocabularies.of(rows, lambda: rows) is not None
    lora.leave(slot)
    assert lora.vocabularies.of(rows, lambda: rows) is None


@pytest.mark.parametrize(
    ("name", "vocab", "part", "problem"),
    [
        ("plain", 1 << 40, {}, f"vocab: expected rows for each of {1 << 40} tokens, found {VOCAB}"),
        ("factors", VOCAB + 1, {}, f"embedding: expected factors for {VOCAB + 1} tokens, found {VOCAB}"),
        ("tokens", None, {"tokens": ((VOCAB, 5),)}, f"expected rows of {VOCAB} tokens, found {VOCAB + 5}"),
        ("tokens", None, {"features": 16}, "embedding: the base's rows have 48 elements, the bundle's 16"),
    ],
)
def test_a_bundle_of_another_vocabulary_is_refused(
    world: World, store: MemoryStore, name: str, vocab: int | None, part: dict[str, Any], problem: str
) -> None:
    """Rows and tokens that the base has no place for are refused before a step computes with them."""
    ready = world.load(store)
    bundle = read_bundle(store, ready.service.local.catalog.get(name).adapter.digest)
    replaced = tuple(each.model_copy(update=part) for each in bundle.manifest.replaced)
    manifest = bundle.manifest.model_copy(update={"vocab": vocab, "replaced": replaced})
    pack = Packer(ready.base.model, ready.lora, ready.base.backend.new_lora, 16)
    pack(bundle)
    with pytest.raises(BundleCorrupt, match=problem):
        pack(replace(bundle, manifest=manifest))
