"""Encoders with adapters, from PEFT's files through the builder to vectors, classes and ranks."""

import base64
import copy
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from inference_service.api.http.vectors.pooling import MAX_NUMBERS
from inference_service.core.sequence import Batch, Sequence as EngineSequence, Vector
from inference_service.engine.execution.runner import Pending
from inference_service.engine.models.encoder import PARTS, Encoder
from inference_service.startup.engine import build_engine
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.faults import AdapterInvalid, CheckpointInvalid, DeploymentInvalid
from loramux_shared.runtime import Pooling
from loramux_shared.storage.memory import MemoryStore
from tests.contract.http.test_scores import bare, loaded, save_random
from tests.support.cases import cases
from tests.support.grpc_api import open_client
from tests.support.openai_api import OpenAIApi, answer_of, assert_close, open_api
from tests.support.pooled import run_pooled
from tests.support.steps import Submit, engine_without_time, runner_around
from tests.support.tiny import VOCAB, World, write_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
FAMILIES = {
    "bert": transformers.BertConfig(**SIZES, hidden_act="gelu"),
    "roberta": transformers.XLMRobertaConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-5),
}
LABELS = {"ranker": 1, "topics": 5}
VECTORS: dict[str, dict[str, Any]] = {
    "usual": {"r": 4, "target_modules": ["query", "value"]},
    "wide": {"r": 7, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["key", "intermediate.dense"]},
    "biased": {"r": 2, "lora_bias": True, "target_modules": ["attention.output.dense"]},
}
HEADS: dict[str, dict[str, Any]] = {
    "ranker": {"r": 6, "target_modules": ["query", "output.dense"]},
    "topics": {"r": 3, "lora_alpha": 5, "target_modules": ["value", "dense"]},
}
MODERN: dict[str, dict[str, Any]] = {
    "usual": {"num_hidden_layers": 4},
    "odd": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 50.0}},
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias"), True),
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}
"""Fields of a ModernBERT beside the sizes."""
OF_MODERN: dict[str, dict[str, Any]] = {
    "narrow": {"r": 4, "target_modules": ["Wqkv"]},
    "wide": {"r": 7, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["Wi", "attn.Wo", "Wqkv"]},
    "biased": {"r": 2, "lora_bias": True, "target_modules": ["mlp.Wo"]},
}
QUERY, DOCUMENTS = "late <2> order<1>s", ["abc", "a dog"]
"""The query has the token that parts two texts, and the one that has no position in a RoBERTa."""
PROMPTS = [[5, 6, 7], [9] * 40, [3 + (7 * place) % 190 for place in range(64)], [8]]
ALIKE = PROMPTS[1:3]
"""Of lengths that share a step."""


def write_base(model: Any, base: Path) -> None:
    """Write a base with random weights, and a tokenizer with special tokens around texts."""
    save_random(model, base, 0)
    write_tokenizer(base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<0>", "<1>", "<2>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<0> $A <2>", pair="<0> $A <2> $B:1 <2>:1", special_tokens=[("<0>", 0), ("<2>", 2)]
    )
    tokenizer.save(str(base / "tokenizer.json"))


@pytest.fixture(scope="module", params=FAMILIES)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[World, MemoryStore]:
    """An encoder with adapters of several kinds, ranks and modules."""
    root = tmp_path_factory.mktemp("encoders")
    base = root / "base"
    torch.manual_seed(0)
    write_base(transformers.AutoModel.from_config(FAMILIES[request.param]), base)
    for seed, (name, config) in enumerate(VECTORS.items()):
        made = get_peft_model(bare(base), LoraConfig(task_type="FEATURE_EXTRACTION", **config))
        save_random(made, root / name, seed)
    for seed, (name, config) in enumerate(HEADS.items()):
        made = get_peft_model(loaded(base, LABELS[name]), LoraConfig(task_type="SEQ_CLS", **config))
        save_random(made, root / name, 9 + seed)
    names = {"id2label": {str(number): f"topic {number}" for number in range(5)}}
    (root / "topics" / "config.json").write_text(json.dumps(names))
    world = World(base, {name: root / name for name in (*VECTORS, *HEADS)}, root)
    return world, world.built()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(made: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(made, max_batch_tokens=100) as opened:
        yield opened


def states(world: World, model: str, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the last hidden states of transformers and PEFT for each prompt."""
    found = bare(world.base)
    if model in world.adapters:
        found = PeftModel.from_pretrained(found, world.adapters[model])
    with torch.no_grad():
        return [found.eval()(torch.tensor([list(ids)])).last_hidden_state[0] for ids in prompts]


@pytest.mark.parametrize("model", ["base", *VECTORS])
async def test_vectors_equal_those_of_transformers(
    made: tuple[World, MemoryStore], api: OpenAIApi, model: str
) -> None:
    """Vectors of every pooling are computed beside each other."""
    hidden = states(made[0], model, PROMPTS)
    required = {
        None: [each.mean(0) for each in hidden],
        "cls": [each[0] for each in hidden],
        "last": [each[-1] for each in hidden],
    }
    for pooling, vectors in required.items():
        body = {"input": PROMPTS, "normalize": False} | ({} if pooling is None else {"pooling": pooling})
        found = await answer_of(api, "/v1/embeddings", model=model, **body)
        assert_close([each["embedding"] for each in found["data"]], torch.stack(vectors))


@pytest.mark.parametrize("model", HEADS)
async def test_scores_equal_those_of_transformers(
    made: tuple[World, MemoryStore], api: OpenAIApi, model: str
) -> None:
    """The second text of a pair is marked."""
    world = made[0]
    whole = PeftModel.from_pretrained(loaded(world.base, LABELS[model]), world.adapters[model]).eval()
    texts = [(QUERY, document) for document in DOCUMENTS]
    encoded = [api.ready.service.text.encode_pair(pair, 64) for pair in texts]
    with torch.no_grad():
        alone = [whole(torch.tensor([ids])).logits[0] for ids in PROMPTS]
        pairs = [
            whole(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0] for ids, types in encoded
        ]
    found = await answer_of(api, "/classify", model=model, input=PROMPTS, use_activation=False)
    assert_close([each["probs"] for each in found["data"]], torch.stack(alone))
    if model == "topics":
        assert found["data"][0]["label"] == f"topic {int(alone[0].argmax())}"
        return
    ranked = await answer_of(api, "/rerank", model=model, query=QUERY, documents=DOCUMENTS)
    best = {each["index"]: each["relevance_score"] for each in ranked["results"]}
    assert_close([best[0], best[1]], torch.cat(pairs).sigmoid())


def adapt(base: Path, adapters: Mapping[str, Mapping[str, Any]]) -> World:
    """Write random adapters for vectors beside a base, from fields of their configs."""
    for seed, (name, settings) in enumerate(adapters.items()):
        made = get_peft_model(bare(base), LoraConfig(task_type="FEATURE_EXTRACTION", **settings))
        save_random(made, base.parent / name, seed)
    return World(base, {name: base.parent / name for name in adapters}, base.parent)


def means(world: World, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return transformers' means of the states of each model and prompt."""
    models = ("base", *world.adapters)
    return torch.stack([each.mean(0) for model in models for each in states(world, model, prompts)])


@pytest.mark.parametrize("fields", MODERN.values(), ids=MODERN)
async def test_a_modern_encoder_equals_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Base and adapters are computed in one batch, over texts longer than what local layers see."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        **copy.deepcopy(SIZES | {"local_attention": 16, "cls_token_id": 0, "sep_token_id": 2} | fields)
    )
    architecture = {"architectures": ["ModernBertModel"]}
    assert (
        read_fields(SIZES | fields | architecture).ropes == read_fields(config.to_dict() | architecture).ropes
    )
    write_base(transformers.AutoModel.from_config(config), base)
    world = adapt(base, OF_MODERN)
    store, expected = world.built(), means(world, PROMPTS)
    requests = [(model, prompt, Pooling.MEAN) for model in ("base", *OF_MODERN) for prompt in PROMPTS]
    for options in ({}, {"deterministic": True}):
        vectors, _ = run_pooled(world.load(store, max_batch_tokens=1024, **options), requests)
        assert_close(vectors, expected)
    scoring = get_peft_model(loaded(base, 1), LoraConfig(task_type="SEQ_CLS", target_modules=["Wqkv"]))
    save_random(scoring, tmp_path / "scoring", 1)
    with pytest.raises(AdapterInvalid, match=r"head\.dense\.weight"):
        World(base, {"scoring": tmp_path / "scoring"}, tmp_path).build(MemoryStore())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
async def test_heads_of_a_modern_encoder_equal_transformers(tmp_path: Path, pooling: str) -> None:
    """Dense layer and norm are the base's, or the adapter's; probabilities are those of the kind of scores."""
    base, fields = tmp_path / "base", MODERN["odd"] | {"classifier_pooling": pooling}
    torch.manual_seed(0)
    write_base(
        transformers.AutoModelForMaskedLM.from_config(transformers.ModernBertConfig(**(SIZES | fields))), base
    )
    kinds = {"regression": 1, "single_label_classification": 3, "multi_label_classification": 4}
    expected = {}
    for seed, (name, labels) in enumerate(kinds.items()):
        settings = LoraConfig(
            task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["head"] if labels == 4 else None
        )
        save_random(get_peft_model(loaded(base, labels), settings), tmp_path / name, seed)
        (tmp_path / name / "config.json").write_text(json.dumps({"problem_type": name}))
        whole = PeftModel.from_pretrained(loaded(base, labels), tmp_path / name).eval()
        with torch.no_grad():
            expected[name] = torch.stack([whole(torch.tensor([ids])).logits[0] for ids in PROMPTS])
    world = World(base, {name: tmp_path / name for name in kinds}, tmp_path)
    shares = {
        "regression": expected["regression"],
        "single_label_classification": expected["single_label_classification"].softmax(-1),
        "multi_label_classification": expected["multi_label_classification"].sigmoid(),
    }
    async with open_api((world, world.built())) as api:
        for name in kinds:
            found = await answer_of(api, "/classify", model=name, input=PROMPTS, use_activation=False)
            assert_close([each["probs"] for each in found["data"]], expected[name])
            found = await answer_of(api, "/classify", model=name, input=PROMPTS)
            assert_close([each["probs"] for each in found["data"]], shares[name])


CROSS: dict[str, Any] = FAMILIES | {"modern": transformers.ModernBertConfig(**(SIZES | MODERN["odd"]))}


@pytest.mark.parametrize("family", CROSS)
async def test_a_cross_encoder_scores_without_an_adapter(tmp_path: Path, family: str) -> None:
    """The base's own head ranks and names its labels, in texts of at most ``max_seq_length`` tokens."""
    config, base = copy.deepcopy(CROSS[family]), tmp_path / "base"
    config.id2label = {0: "relevance"}
    write_base(transformers.AutoModelForSequenceClassification.from_config(config), base)
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 30}')
    world, whole = World(base, {}, tmp_path), loaded(base, 1).eval()
    async with open_api((world, world.built())) as api:
        encoded = [api.ready.service.text.encode_pair((QUERY, each), 64) for each in DOCUMENTS]
        with torch.no_grad():
            expected = [
                whole(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0]
                for ids, types in encoded
            ]
        ranked = await answer_of(api, "/rerank", model="base", query=QUERY, documents=DOCUMENTS)
        best = {each["index"]: each["relevance_score"] for each in ranked["results"]}
        assert_close([best[0], best[1]], torch.cat(expected).sigmoid())
        [found] = (await answer_of(api, "/classify", model="base", input="a"))["data"]
        assert found["label"] == "relevance"
        ranks = (await api.post("/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True)).json()
        raw = {each["index"]: each["score"] for each in ranks}
        assert_close([raw[0], raw[1]], torch.cat(expected))
        assert [each["label"] for each in (await api.post("/predict", inputs="a")).json()] == ["relevance"]
        answer = await api.post("/rerank", model="base", query=QUERY, documents=["a" * 30])
        assert "at most 30" in answer.json()["error"]["message"]
        body = {"model": "base", "query": QUERY, "documents": ["a" * 30], "truncate_prompt_tokens": -1}
        await answer_of(api, "/rerank", **body)
    assert read_config(base, 50).max_positions > 50
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": "long"}')
    with pytest.raises(CheckpointInvalid, match="max_seq_length: expected a positive integer"):
        read_config(base)


async def test_a_model_that_takes_no_types_is_told_none(tmp_path: Path) -> None:
    """Transformers passes the types of a pair where ``model_input_names`` has them; also of texts cut short."""
    config, base = copy.deepcopy(FAMILIES["bert"]), tmp_path / "base"
    config.id2label = {0: "relevance"}
    write_base(transformers.AutoModelForSequenceClassification.from_config(config), base)
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    (base / "tokenizer_config.json").write_text(json.dumps(names))
    world, whole = World(base, {}, tmp_path), loaded(base, 1).eval()
    async with open_api((world, world.built())) as api:
        text = api.ready.service.text
        encoded = [text.encode_pair((QUERY, each), 64)[0] for each in DOCUMENTS]
        with torch.no_grad():
            expected = torch.cat([whole(torch.tensor([ids])).logits[0] for ids in encoded])
        for cut in ({}, {"truncate_prompt_tokens": 64}):
            ranked = await answer_of(api, "/rerank", model="base", query=QUERY, documents=DOCUMENTS, **cut)
            best = {each["index"]: each["relevance_score"] for each in ranked["results"]}
            assert_close([best[0], best[1]], expected.sigmoid())


async def test_pooling_answers_as_vllm_does(made: tuple[World, MemoryStore], api: OpenAIApi) -> None:
    """States of all tokens are transformers', of length 1 by default; other tasks are those of their routes."""
    hidden, body = states(made[0], "usual", PROMPTS), {"model": "usual", "input": PROMPTS}
    found = await answer_of(api, "/pooling", **body, normalize=False)
    for each, expected in zip(found["data"], hidden, strict=True):
        assert_close(each["data"], expected)
    cut = {"task": "token_embed", "dimensions": 7, "encoding_format": "base64"}
    for each, expected in zip((await answer_of(api, "/pooling", **body, **cut))["data"], hidden, strict=True):
        rows = np.frombuffer(base64.b64decode(each["data"]), "<f4").reshape(-1, 7)
        assert_close(rows, torch.nn.functional.normalize(expected[:, :7], dim=-1))
    one = await answer_of(api, "/pooling", **body, task="embed", pooling="cls")
    known = await answer_of(api, "/v1/embeddings", **body, pooling="cls")
    assert_close([each["data"] for each in one["data"]], [each["embedding"] for each in known["data"]])
    body["model"] = "topics"
    for more in ({}, {"use_activation": False}):
        shares = await answer_of(api, "/pooling", **body, task="classify", **more)
        labelled = await answer_of(api, "/classify", **body, **more)
        assert_close([each["data"] for each in shares["data"]], [each["probs"] for each in labelled["data"]])
    many = (MAX_NUMBERS // SIZES["hidden_size"] // 64 + 1) * ["a" * 62]
    for wrong, part in (
        ({"pooling": "mean"}, "pooling: expected nothing with task token_embed"),
        ({"task": "classify", "dimensions": 7}, "dimensions"),
        ({"task": "token_classify"}, "one of texts"),
        ({"task": "classify", "model": "usual"}, "makes vectors"),
        ({"input": many}, "tokens together"),
    ):
        answer = await api.post("/pooling", **body | wrong)
        assert (answer.status_code, part in answer.json()["error"]["message"]) == (400, True), answer.text


async def test_steps_between_two_parts_of_another_change_nothing(
    made: tuple[World, MemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of other adapters and lengths go on by turns, a layer each: each has what it has alone."""
    monkeypatch.setattr("inference_service.startup.engine.PART_S", 0.0)
    world, turns = made[0], list[list[float]]()

    def in_turns(submit: Submit, batch: Batch) -> Pending:
        every, *single = [submit(each) for each in (batch, *(Batch((chunk,)) for chunk in batch.chunks))]

        def go_on() -> float:
            turns.append([each.go_on() for each in single])
            return every.go_on()

        def vectors() -> list[tuple[EngineSequence, Vector]]:
            alone = dict(pair for each in single for pair in each.vectors())
            found = every.vectors()
            for seq, vector in found:
                assert_close(vector, alone[seq])
            return found

        return replace(every, go_on=go_on, vectors=vectors)

    models = ("base", *VECTORS)
    requests = [(model, prompt, Pooling.CLS) for model in models for prompt in ALIKE]
    build = partial(build_engine, new_runner=runner_around(in_turns), clock=lambda: 0.0)
    vectors, _ = run_pooled(world.load(made[1], build=build), requests)
    expected = [each[0] for model in models for each in states(world, model, ALIKE)]
    assert_close(vectors, torch.stack(expected))
    assert {len(each) for each in turns} == {1, len(requests)}, "the warm-up's step, and those of the requests"


@pytest.mark.parametrize("kind", ["bert", "modern", "rotated"])
async def test_layers_without_adapters_run_once_for_a_text_of_several_models(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are those of different texts, below the first layer that an adapter of a shared text adds to."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    layers, query = 4, "Wqkv" if kind == "modern" else "q_proj" if kind == "rotated" else "query"
    fields = SIZES | {"num_hidden_layers": layers}
    config = {
        "bert": transformers.BertConfig,
        "modern": transformers.ModernBertConfig,
        "rotated": transformers.JinaEmbeddingsV3Config,
    }[kind](**fields)
    write_base(transformers.AutoModel.from_config(config), base)
    adapted = {"high": "3", "middle": "[23]", "low": "[03]"}
    patterns = {name: rf".*layers?\.{numbers}\..*\.{query}" for name, numbers in adapted.items()}
    world = adapt(base, {name: {"r": 3, "target_modules": pattern} for name, pattern in patterns.items()})
    rows: list[int] = []
    parts_of = Encoder.parts

    def counted(self: Encoder, x: torch.Tensor, *more: Any) -> Iterator[torch.Tensor]:
        for each in parts_of(self, x, *more):
            rows.append(len(each))
            yield each

    store, expected = world.built(), means(world, ALIKE)
    ready = world.load(store, build=engine_without_time())
    monkeypatch.setattr(Encoder, "parts", counted)
    lengths = sum(map(len, ALIKE))
    for models, high in ((("base", "high", "middle"), 2), (("base", "high", "middle", "low"), 2)):
        rows.clear()
        texts = [(model, prompt, Pooling.MEAN) for model in models for prompt in ALIKE]
        vectors, _ = run_pooled(ready, texts)
        assert_close(vectors, expected[: len(texts)])
        own = lengths * (len(models) - 3)
        assert rows == [lengths + own] * PARTS * high + [lengths * len(models)] * PARTS * (layers - high)


async def test_both_apis_serve_the_same_vectors(api: OpenAIApi) -> None:
    """The client of gRPC names the first state too."""
    body = {"model": "usual", "input": "abc", "pooling": "cls"}
    required = (await answer_of(api, "/v1/embeddings", **body))["data"][0]["embedding"]
    async with open_client(api.ready) as client:
        found = await client.embed("usual", ["abc"], pooling="cls")
    assert_close(found.vectors[0], required)


async def test_texts_are_truncated_as_transformers_does(api: OpenAIApi) -> None:
    """The special tokens at the end stay."""
    body = {"model": "usual", "truncate_prompt_tokens": 5}
    whole = await answer_of(api, "/v1/embeddings", **body, input="abc")
    assert whole == await answer_of(api, "/v1/embeddings", **body, input="abc" + 90 * "d")
    left = await api.post("/embed", **body, inputs=90 * "d" + "abc", truncate=True, truncation_direction="Left")
    assert left.json() == [each["embedding"] for each in whole["data"]]


async def test_bits_of_a_vector_are_independent_of_the_batch(made: tuple[World, MemoryStore]) -> None:
    """Repeatable answers include vectors."""
    ready = made[0].load(made[1], deterministic=True, max_batch_tokens=256)
    requests = [
        (model, prompt, Pooling.MEAN) for prompt in PROMPTS for model in ("base", "usual", "wide", "dora")
    ]
    together, _ = run_pooled(ready, requests)
    for request, vector in zip(requests, together, strict=True):
        assert (run_pooled(ready, [request])[0][0] == vector).all()


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/v1/completions", {"model": "base", "prompt": "abc"}, "found base, one that makes vectors"),
        ("/v1/chat/completions", {"model": "usual", "messages": [{"role": "user", "content": "a"}]}, "usual"),
        ("/v1/embeddings", {"model": "wide", "input": [[5] * 67]}, "the prompt has 67 tokens"),
        ("/v1/embeddings", {"model": "wide", "input": "a" * 80}, "the prompt has 82 tokens, and at most 6"),
        ("/v1/embeddings", {"model": "wide", "input": "a", "pooling": "max"}, "cls or mean or last"),
        ("/rerank", {"model": "base", "query": "a", "documents": ["b"]}, "one that makes vectors"),
    ],
)
async def test_what_an_encoder_cannot_do_is_refused(
    api: OpenAIApi, path: str, body: dict[str, Any], part: str
) -> None:
    """The refusal names what is served."""
    answer = await api.post(path, **body)
    assert answer.status_code == 400
    assert part in answer.json()["error"]["message"]


@pytest.mark.parametrize(("config", "code"), cases(__file__, "INEXACT"))
async def test_adapters_that_cannot_be_exact_are_refused(
    made: tuple[World, MemoryStore], tmp_path: Path, config: dict[str, Any], code: str
) -> None:
    """An adapter of embeddings, whole layers or tokens is refused, and a classifier without a head."""
    model = get_peft_model(bare(made[0].base), LoraConfig(**config))
    save_random(model, tmp_path, 1)
    with pytest.raises(AdapterInvalid) as caught:
        World(made[0].base, {"wrong": tmp_path}, tmp_path.parent.parent.parent).build(MemoryStore())
    assert code in {finding.code for finding in caught.value.findings}


async def test_a_deployment_that_asks_for_tokens_or_merged_weights_is_refused(
    made: tuple[World, MemoryStore],
) -> None:
    """Both fields are named."""
    world, runtime = replace(made[0], adapters={"usual": made[0].adapters["usual"]}), {"merge": "always"}
    with pytest.raises(DeploymentInvalid) as caught:
        world.build_with(MemoryStore(), build={"prove": True}, runtime=runtime | {"serve_base": False})
    assert [finding.where for finding in caught.value.findings] == ["runtime.merge", "build.prove"]


@pytest.mark.parametrize(("field", "value"), cases(__file__, "SWITCHES"))
async def test_switches_of_a_config_that_are_not_served_are_refused(field: str, value: Any) -> None:
    """A switch that would change vectors is named."""
    fields = FAMILIES["bert"].to_dict() | {"architectures": ["BertForSequenceClassification"], "id2label": {}}
    assert read_fields(fields).encodes
    with pytest.raises(CheckpointInvalid, match=field):
        read_fields(fields | {field: value})


async def test_a_pair_without_rows_for_its_types_ends_alone(tmp_path: Path) -> None:
    """A base of one token type whose tokenizer has two refuses pairs, and tokens that it has no row for."""
    config, base = copy.deepcopy(FAMILIES["bert"]), tmp_path / "base"
    config.type_vocab_size, config.id2label = 1, {0: "relevance"}
    write_base(transformers.AutoModelForSequenceClassification.from_config(config), base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([f"more {number}" for number in range(VOCAB)])
    tokenizer.save(str(base / "tokenizer.json"))
    world, whole = World(base, {}, tmp_path), loaded(base, 1).eval()
    async with open_api((world, world.built())) as api:
        answer = await api.post("/rerank", model="base", query=QUERY, documents=DOCUMENTS)
        assert (answer.status_code, "type_vocab_size of the base is 1" in answer.text) == (400, True)
        answer = await api.post("/classify", model="base", input=f"more {VOCAB - 1}")
        assert (answer.status_code, f"tokens from 0 to {VOCAB - 1}" in answer.text) == (400, True)
        [found] = (await answer_of(api, "/classify", model="base", input=[PROMPTS[0]], use_activation=False))[
            "data"
        ]
        with torch.no_grad():
            assert_close(found["probs"], whole(torch.tensor([PROMPTS[0]])).logits[0])


async def test_heads_of_a_modern_encoder_with_another_activation_are_refused(tmp_path: Path) -> None:
    """Vectors are made all the same; a head is refused by name, an adapter's and the base's own."""
    config = transformers.ModernBertConfig(**SIZES, classifier_activation="relu")
    write_base(transformers.AutoModelForMaskedLM.from_config(config), tmp_path / "base")
    for name, settings in {
        "vectors": LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["Wqkv"]),
        "scores": LoraConfig(task_type="SEQ_CLS", target_modules=["Wqkv"]),
    }.items():
        whole = bare(tmp_path / "base") if name == "vectors" else loaded(tmp_path / "base", 2)
        save_random(get_peft_model(whole, settings), tmp_path / name, 0)
    assert World(tmp_path / "base", {"vectors": tmp_path / "vectors"}, tmp_path).built()
    with pytest.raises(AdapterInvalid, match="with another activation or pooling"):
        World(tmp_path / "base", {"scores": tmp_path / "scores"}, tmp_path).build(MemoryStore())
    with pytest.raises(CheckpointInvalid, match="classifier_activation"):
        read_fields(config.to_dict() | {"architectures": ["ModernBertForSequenceClassification"]})
