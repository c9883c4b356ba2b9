"""Decoders that score a document for a query by two logits, as sentence-transformers' LogitScore has it."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config

from loramux_shared.bases.config import LogitScore
from loramux_shared.bases.logit_score import LOGIT_SCORE, logit_score_in
from loramux_shared.bases.read import read_config
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.runtime import PROMPTS
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.openai_api import OpenAIApi, answer_of, assert_close, open_api
from tests.support.tiny import SIZES, World, make_adapter, make_checkpoint, oracle

pytestmark = pytest.mark.asyncio(loop_scope="module")
YES, NO = 97, 42
INSTRUCTION = "Which text is about the query?"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}answer{% else %}yes or no? {% endif %}"
)
BEHIND = len("\nyes or no? ")
"""Tokens that this template writes behind a document: one for each character."""
QUERY = "a late order"
DOCUMENTS = ["Refunds take a week.", " Delivery is late today. ", "zz top", "Delivery is late today."]


def make_reranker(folder: Path, tokens: dict[str, Any], about: dict[str, Any]) -> None:
    """Save a tiny decoder with the files of sentence-transformers beside it."""
    make_checkpoint(folder, Qwen3Config(**SIZES))
    (folder / LOGIT_SCORE).parent.mkdir()
    (folder / LOGIT_SCORE).write_text(json.dumps(tokens))
    (folder / PROMPTS).write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    root = tmp_path_factory.mktemp("rerankers")
    about = {"prompts": {"query": INSTRUCTION}, "default_prompt_name": "query", "activation_fn": None}
    make_reranker(root / "base", {"true_token_id": YES, "false_token_id": NO}, about)
    targets = {"mine": ["q_proj", "down_proj"], "yours": ["v_proj"], "headed": ["o_proj", "lm_head"]}
    for seed, (name, modules) in enumerate(targets.items()):
        make_adapter(root / "base", root / name, seed, r=4, target_modules=modules)
    world = World(root / "base", {name: root / name for name in targets}, root)
    return world, world.built()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(made: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(made, max_batch_tokens=32) as api:
        yield api


def tokens_of(world: World, document: str) -> list[int]:
    """Return what transformers' tokenizer makes of a pair."""
    files = {"tokenizer_file": str(world.base / "tokenizer.json"), "chat_template": TEMPLATE}
    tokenizer = PreTrainedTokenizerFast(**files, unk_token="<0>")  # noqa: S106 - a token of text
    turns = {"system": INSTRUCTION, "query": QUERY, "document": document}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def margins(world: World, name: str, prompts: list[list[int]]) -> np.ndarray[Any, Any]:
    """Return how much larger one token's logit is than the other's, as transformers and PEFT have it."""
    model = oracle(world.base, world.adapters.get(name))
    with torch.no_grad():
        last = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return np.array([float(logits[YES] - logits[NO]) for logits in last])


@pytest.mark.parametrize("model", ["base", "mine"])
async def test_scores_are_margins_of_two_logits(
    made: tuple[World, MemoryStore], api: OpenAIApi, model: str
) -> None:
    """The base and adapters without a head score pairs; documents are ranked by their probabilities."""
    expected = margins(made[0], model, [tokens_of(made[0], document) for document in DOCUMENTS])
    pairs = {"model": model, "text_1": QUERY, "text_2": DOCUMENTS}
    raw = await answer_of(api, "/score", **pairs, use_activation=False)
    assert_close([each["score"] for each in raw["data"]], expected)
    order = sorted(range(len(DOCUMENTS)), key=lambda index: (-expected[index], index))
    ranked = await answer_of(api, "/v1/rerank", model=model, query=QUERY, documents=DOCUMENTS)
    assert [each["index"] for each in ranked["results"]] == order
    shares = 1 / (1 + np.exp(-expected[order]))
    assert_close([each["relevance_score"] for each in ranked["results"]], shares)


async def test_they_still_generate_and_blend(api: OpenAIApi) -> None:
    """A reranker is a decoder; a blend of its adapters scores with the base's head, too."""
    text = await answer_of(api, "/v1/completions", model="base", prompt="yes", max_tokens=3)
    assert text["usage"]["completion_tokens"] == 3
    blend = await answer_of(api, "/score", model="mine*0.5+yours", text_1=QUERY, text_2=DOCUMENTS)
    assert len({each["score"] for each in blend["data"]}) == 3  # one document is there twice


async def test_a_head_of_its_own_is_refused(api: OpenAIApi) -> None:
    """An adapter that changes logits of the head would be scored by another head than its own."""
    answer = await api.post("/score", model="headed", text_1=QUERY, text_2=DOCUMENTS)
    assert answer.status_code == 400
    assert "headed, one that generates text" in answer.text


async def test_long_documents_lose_their_ends(made: tuple[World, MemoryStore], api: OpenAIApi) -> None:
    """The words of a template behind a document stay, as in sentence-transformers."""
    world, document = made[0], DOCUMENTS[0] * 30
    whole = tokens_of(world, document)
    most = 150
    expected = margins(world, "base", [whole[: most - BEHIND] + whole[-BEHIND:]])
    pair = {"model": "base", "text_1": QUERY, "text_2": document, "use_activation": False}
    found = await answer_of(api, "/score", **pair, truncate_prompt_tokens=most)
    assert found["usage"]["prompt_tokens"] == most
    assert_close([found["data"][0]["score"]], expected)
    for cut, part in ((None, "at most"), (60, "truncate_prompt_tokens")):
        answer = await api.post("/score", **pair, truncate_prompt_tokens=cut)
        assert answer.status_code == 400
        assert part in answer.text
    left = await api.post("/rerank", query=QUERY, texts=[document], truncate=True, truncation_direction="Left")
    assert left.status_code == 413 or "truncation" in left.text


@pytest.mark.parametrize(("tokens", "about", "expected"), cases(__file__, "test_how_a_base_scores"))
async def test_how_a_base_scores(
    tmp_path: Path, tokens: object, about: object, expected: dict[str, Any] | str
) -> None:
    """Tokens, instruction and activation are read; what says something else is refused by its name."""
    base = tmp_path / "base"
    make_reranker(base, {}, {})
    (base / LOGIT_SCORE).write_text(json.dumps(tokens))
    (base / PROMPTS).write_text(json.dumps(about))
    if isinstance(expected, str):
        with pytest.raises(CheckpointInvalid, match=expected):
            read_config(base)
    else:
        assert read_config(base).logit_score == LogitScore(**expected)


async def test_capped_logits_are_refused(made: tuple[World, MemoryStore]) -> None:
    """A cap is no part of a head's row."""
    plain = read_config(made[0].base)
    for changed in ({"logit_softcap": 30.0}, {"head_bias": True}):
        with pytest.raises(CheckpointInvalid, match="LogitScore"):
            logit_score_in(made[0].base, replace(plain, **changed))


async def test_another_template_is_refused(api: OpenAIApi) -> None:
    """A template that does not know the roles is no reason for a score of something else."""
    text = api.ready.service.text
    template = text.template
    assert template is not None
    try:
        text.template = type(template)("{{ messages[0].content }}", {})
        answer = await api.post("/score", model="base", text_1=QUERY, text_2=DOCUMENTS)
    finally:
        text.template = template
    assert answer.status_code == 400
    assert "query and document" in answer.text
