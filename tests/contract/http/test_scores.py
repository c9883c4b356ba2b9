"""Adapters that classify, from PEFT's files through the builder to ``/classify``, ``/score``, ``/rerank``."""

import json
from collections.abc import AsyncIterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig

from loramux_shared import runtime
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.faults import RequestInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.cases import cases
from tests.support.grpc_api import open_client
from tests.support.openai_api import OpenAIApi, answer_of, assert_close, open_api
from tests.support.tiny import SIZES, World, make_adapter, make_checkpoint

pytestmark = pytest.mark.asyncio(loop_scope="module")
LABELS = {"ranker": 1, "topics": 5}
NAMES = ["sport", "science", "law", "music", "other"]
PROMPTS = [[5, 6, 7], [9] * 30, [3 + (7 * place) % 190 for place in range(70)]]
DOCUMENTS = ["abc", "the cat", "zz top", "a dog and a cat", "abc"]


def loaded(base: Path, labels: int) -> Any:
    """The base with a head of zeros: PEFT's files bring the trained one."""
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)


def make_classifier(base: Path, folder: Path, labels: int, seed: int, **config: Any) -> None:
    """Save an adapter with a random head as PEFT does."""
    save_random(get_peft_model(loaded(base, labels), LoraConfig(task_type="SEQ_CLS", **config)), folder, seed)


def bare(base: Path) -> Any:
    return AutoModel.from_pretrained(base, dtype=torch.float32)


def save_random(model: Any, folder: Path, seed: int) -> None:
    """Save a model with random changes of the parameters that are trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter + torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, MemoryStore]:
    """Two that classify, one of them with names for its labels, and one that generates."""
    root = tmp_path_factory.mktemp("scores")
    make_checkpoint(root / "base", LlamaConfig(**SIZES))
    (root / "base" / runtime.PROMPTS).write_text(json.dumps({"prompts": {"query": "find: ", "document": ""}}))
    make_classifier(root / "base", root / "ranker", 1, 1, r=6, target_modules=["q_proj", "down_proj"])
    make_classifier(root / "base", root / "topics", 5, 2, r=3, lora_alpha=5, target_modules=["v_proj"])
    about = {"id2label": {str(number): name for number, name in enumerate(NAMES)}}
    (root / "topics" / "config.json").write_text(json.dumps(about))
    make_adapter(root / "base", root / "plain", 3, r=4, target_modules=["o_proj"])
    encoder = LoraConfig(task_type="FEATURE_EXTRACTION", r=5, target_modules=["k_proj", "up_proj"])
    save_random(get_peft_model(bare(root / "base"), encoder), root / "encoder", 4)
    names = (*LABELS, "plain", "encoder")
    world = World(root / "base", {name: root / name for name in names}, root)
    return world, world.built()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def opened(made: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(made, max_batch_tokens=32) as api:
        yield api


@cache
def oracle(base: Path, adapter: Path, labels: int) -> Any:
    """The model as transformers and PEFT run it."""
    return PeftModel.from_pretrained(loaded(base, labels), adapter).eval()


def logits(world: World, model: str, prompts: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """Return the logits of transformers and PEFT, of each prompt alone."""
    whole = oracle(world.base, world.adapters[model], LABELS[model])
    with torch.no_grad():
        return np.stack([whole(torch.tensor([list(prompt)])).logits[0].numpy() for prompt in prompts])


async def test_the_bundle_has_the_head_as_it_is(made: tuple[World, MemoryStore]) -> None:
    """The bundle has the head in float32 in a separate file, and labels in the manifest."""
    world, store = made
    generation = current_generation(store, "tiny")
    assert {
        name: record.summary and record.summary.num_labels for name, record in generation.adapters.items()
    } == {"ranker": 1, "topics": 5, "plain": None, "encoder": None}
    bundle = read_bundle(store, generation.adapters["topics"].digest)
    assert bundle.manifest.score == ScoreHead(num_labels=5, hidden_size=48, id2label=tuple(NAMES))
    assert bundle.manifest.format_version == 2
    assert "base_model.model.score.weight" in bundle.manifest.coverage.used
    trained = oracle(world.base, world.adapters["topics"], 5).base_model.model.score.modules_to_save["default"]
    assert (bundle.score == trained.weight.detach().numpy()).all()


@pytest.mark.parametrize("model", LABELS)
async def test_scores_equal_transformers(made: tuple[World, MemoryStore], api: OpenAIApi, model: str) -> None:
    """Scores of token ids, in chunks and beside an answer, are transformers' logits and label probabilities."""
    expected = logits(made[0], model, PROMPTS)
    raw = await answer_of(api, "/classify", model=model, input=PROMPTS, use_activation=False)
    assert_close([each["probs"] for each in raw["data"]], expected)
    assert raw["usage"]["prompt_tokens"] == sum(map(len, PROMPTS))
    reported = await answer_of(api, "/v1/classify", model=model, input=PROMPTS)
    states = torch.from_numpy(expected)
    shares = torch.softmax(states, -1) if model == "topics" else torch.sigmoid(states)
    assert_close([each["probs"] for each in reported["data"]], shares.numpy())
    names = NAMES if model == "topics" else ["LABEL_0"]
    assert [each["label"] for each in reported["data"]] == [names[best] for best in expected.argmax(-1)]
    assert {each["num_classes"] for each in reported["data"]} == {LABELS[model]}


async def test_documents_are_ranked_as_transformers_ranks_them(
    made: tuple[World, MemoryStore], api: OpenAIApi
) -> None:
    """The tokenizer joins query and document; the best comes first, of equals the earlier one."""
    text = api.ready.service.text
    pairs = [text.encode_pair(("a cat", document), 256)[0] for document in DOCUMENTS]
    expected = logits(made[0], "ranker", pairs)[:, 0]
    order = sorted(range(len(DOCUMENTS)), key=lambda index: (-expected[index], index))
    whole = await answer_of(api, "/v1/rerank", model="ranker", query="a cat", documents=DOCUMENTS)
    assert [each["index"] for each in whole["results"]] == order
    shares = 1 / (1 + np.exp(-expected))
    assert_close([each["relevance_score"] for each in whole["results"]], shares[order])
    assert [each["document"]["text"] for each in whole["results"]] == [DOCUMENTS[index] for index in order]
    objects = [{"text": document} for document in DOCUMENTS]
    few = await answer_of(
        api, "/rerank", model="ranker", query="a cat", documents=objects, top_n=2, return_documents=False
    )
    assert [each["index"] for each in few["results"]] == order[:2]
    assert all("document" not in each for each in few["results"])
    one = await answer_of(api, "/score", model="ranker", text_1="a cat", text_2=DOCUMENTS, use_activation=False)
    assert_close([each["score"] for each in one["data"]], expected)
    both = await answer_of(api, "/v1/score", model="ranker", text_1=["a cat"] * 5, text_2=DOCUMENTS)
    assert_close([each["score"] for each in both["data"]], shares)


@pytest.mark.sweep
async def test_coheres_client_ranks_documents(api: OpenAIApi) -> None:
    """Both versions of its API return what plain HTTP does; fields of documents are refused by name."""
    cohere = pytest.importorskip("cohere")
    requested: dict[str, Any] = {"model": "ranker", "query": "a cat", "documents": DOCUMENTS, "top_n": 3}
    known = (await answer_of(api, "/v1/rerank", **requested))["results"]
    first, second = (kind("none", base_url=api.url) for kind in (cohere.AsyncClient, cohere.AsyncClientV2))
    objects = [{"text": document} for document in DOCUMENTS]
    for found in (
        await second.rerank(**requested),
        await first.rerank(**requested, return_documents=True),
        await first.rerank(**requested | {"documents": objects}),
    ):
        assert [(each.index, each.relevance_score) for each in found.results] == [
            (each["index"], pytest.approx(each["relevance_score"], abs=1e-5)) for each in known
        ]
        assert dict(found.results[0].document) == known[0]["document"]
    assert all(0 < each.relevance_score < 1 for each in (await second.rerank(**requested)).results)
    for client, wrong, part in (
        (first, {"rank_fields": ["text"]}, "rank_fields"),
        (second, {"max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        (second, {"documents": []}, "documents"),
        (second, {"documents": ["a" * 300]}, "at most"),
        (second, {"model": "topics"}, "a score head of 1 label"),
    ):
        with pytest.raises(cohere.errors.BadRequestError, match=part):
            await client.rerank(**requested | wrong)


async def test_grpc_gives_the_same_scores(made: tuple[World, MemoryStore], api: OpenAIApi) -> None:
    """Scores and probabilities of all labels, of ids and of pairs, are the same with the Python client."""
    async with open_client(api.ready) as client:
        found = await client.classify("topics", PROMPTS)
        assert_close([each.scores for each in found.texts], logits(made[0], "topics", PROMPTS))
        assert found.labels == tuple(NAMES)
        assert_close([sum(each.probabilities) for each in found.texts], [1.0] * len(PROMPTS))
        pair, _ = api.ready.service.text.encode_pair(("a cat", "abc"), 256)
        [scored] = (await client.classify("ranker", [("a cat", "abc")])).texts
        assert_close(scored.scores, logits(made[0], "ranker", [pair])[0])
        with pytest.raises(RequestInvalid, match="one that generates text"):
            await client.classify("plain", ["x"])
        with pytest.raises(RequestInvalid, match="one that classifies texts"):
            await client.complete("topics", "x")


async def test_who_classifies_generates_nothing(api: OpenAIApi) -> None:
    """Answers, mixtures and scores of the others are refused by name; vectors are made of both."""
    for model, path, body in cases(__file__, "test_who_classifies_generates_nothing"):
        answer = await api.post(path, model=model, **body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", "model"), error
    unknown = await api.post("/classify", model="topics", input=[[500]])
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "input")
    made = await answer_of(api, "/v1/embeddings", model="topics", input=[[5, 6], [7]])
    assert len(made["data"]) == 2


async def test_who_makes_vectors_makes_nothing_else(made: tuple[World, MemoryStore], api: OpenAIApi) -> None:
    """An adapter of PEFT's FEATURE_EXTRACTION, whose keys are those of a model without a head."""
    whole = PeftModel.from_pretrained(bare(made[0].base), made[0].adapters["encoder"]).eval()
    with torch.no_grad():
        states = [whole(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    for pooling, expected in (
        ("last", [each[-1] for each in states]),
        ("mean", [each.mean(0) for each in states]),
    ):
        found = await answer_of(
            api, "/v1/embeddings", model="encoder", input=PROMPTS, pooling=pooling, normalize=False
        )
        assert_close([each["embedding"] for each in found["data"]], np.stack(expected))
    described = (await api.http.get("/v1/models/encoder")).json()
    assert (described["kinds"], described["num_labels"]) == (["lora", "encoder"], None)
    async with open_client(api.ready) as client:
        served = {each.name: each.num_labels for each in await client.models()}
    assert served == LABELS | dict.fromkeys(("base", "plain", "encoder"), 0)
