"""Decoders without the head of their vocabulary: bare ones, those for vectors, those with a score head."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig, Qwen3Config

from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import FILE
from tests.support.openai_api import OpenAIApi, answer_of, assert_close, open_api
from tests.support.tiny import SIZES, World, make_adapter
from tests.support.tokens import write_tokenizer

PROMPTS = [[5, 6, 7], [9] * 30, [3 + (7 * place) % 190 for place in range(70)]]
NAMES = {0: "bad", 1: "so", 2: "good"}
TARGETS = ["q_proj", "down_proj"]


def save(model: Any, folder: Path, seed: int = 0) -> None:
    """Save a model, or an adapter, with random numbers in what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)


def make_bare(base: Path) -> None:
    """As e5-mistral is: the class without a head, whose tensors have no prefix."""
    save(AutoModel.from_config(LlamaConfig(**SIZES), dtype=torch.float32), base)


def make_for_vectors(base: Path) -> None:
    """As Qwen3-Embedding-8B is: the class with a head that is not tied and not there."""
    model = AutoModel.from_config(Qwen3Config(**SIZES | {"tie_word_embeddings": False}), dtype=torch.float32)
    save(model, base)
    config = base / "config.json"
    config.write_text(config.read_text().replace("Qwen3Model", "Qwen3ForCausalLM"))
    (base / FILE).parent.mkdir()
    (base / FILE).write_text('{"pooling_mode_lasttoken": true}')


def make_scoring(base: Path) -> None:
    """A reward model, or a reranker that was converted."""
    config = LlamaConfig(**SIZES, id2label=NAMES, label2id={name: place for place, name in NAMES.items()})
    save(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), base)


def scoring(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)


def bare(base: Path) -> Any:
    return AutoModel.from_pretrained(base, dtype=torch.float32)


@asynccontextmanager
async def served(root: Path, make: Callable[[Path], None]) -> AsyncIterator[tuple[World, OpenAIApi]]:
    """Serve a base, with an adapter for vectors, one that classifies, and one that was trained on text."""
    base = root / "base"
    make(base)
    write_tokenizer(base)
    of_vectors = LoraConfig(task_type="FEATURE_EXTRACTION", r=5, target_modules=TARGETS)
    save(get_peft_model(bare(base), of_vectors), root / "vectors", 1)
    classifies = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=TARGETS)
    save(get_peft_model(scoring(base), classifies), root / "classes", 2)
    make_adapter(base, root / "text", 3, r=4, target_modules=TARGETS)
    world = World(base, {name: root / name for name in ("vectors", "classes", "text")}, root)
    async with open_api((world, world.built()), max_batch_tokens=32) as api:
        yield world, api


@pytest.mark.parametrize("make", [make_bare, make_for_vectors, make_scoring])
async def test_vectors_and_scores_as_in_transformers(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """The base, and adapters of three kinds, none of which generates text."""
    async with served(tmp_path, make) as (world, api):
        for name in ("base", "vectors"):
            model = bare(world.base).eval()
            if name != "base":
                model = PeftModel.from_pretrained(model, world.adapters[name]).eval()
            with torch.no_grad():
                states = [model(torch.tensor([each])).last_hidden_state[0, -1].numpy() for each in PROMPTS]
            found = await answer_of(api, "/v1/embeddings", model=name, input=PROMPTS, normalize=False)
            assert_close([each["embedding"] for each in found["data"]], np.stack(states))
        whole = PeftModel.from_pretrained(scoring(world.base), world.adapters["classes"]).eval()
        with torch.no_grad():
            logits = np.stack([whole(torch.tensor([each])).logits[0].numpy() for each in PROMPTS])
        found = await answer_of(api, "/classify", model="classes", input=PROMPTS, use_activation=False)
        assert_close([each["probs"] for each in found["data"]], logits)
        for name in ("base", "vectors", "classes", "text"):
            refused = await api.post("/v1/completions", model=name, prompt="a", max_tokens=2)
            assert refused.status_code == 400
            assert "a model that generates text" in refused.text
        found = await answer_of(api, "/v1/embeddings", model="text", input=PROMPTS)
        assert len(found["data"]) == len(PROMPTS)


async def test_a_base_has_its_own_score_head(tmp_path: Path) -> None:
    """A reward model classifies with the labels and logits of transformers."""
    async with served(tmp_path, make_scoring) as (world, api):
        model = scoring(world.base).eval()
        with torch.no_grad():
            logits = np.stack([model(torch.tensor([each])).logits[0].numpy() for each in PROMPTS])
        found = await answer_of(api, "/classify", model="base", input=PROMPTS, use_activation=False)
        assert_close([each["probs"] for each in found["data"]], logits)
        assert [each["label"] for each in found["data"]] == [NAMES[best] for best in logits.argmax(-1)]


async def test_a_head_that_should_be_there(tmp_path: Path) -> None:
    """A checkpoint of a model that generates is incomplete without its head."""

    def make(base: Path) -> None:
        make_for_vectors(base)
        (base / FILE).unlink()

    with pytest.raises(CheckpointInvalid, match=r"lm_head\.weight"):
        async with served(tmp_path, make):
            pass
