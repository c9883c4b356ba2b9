"""Adapters that label tokens, from PEFT's files to entities as transformers' pipeline returns them."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import transformers
from huggingface_hub import AsyncInferenceClient
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, TokenClassificationPipeline

from inference_service.core.request import AnswerDelta
from inference_service.driver.telemetry.record import RequestRecord
from loramux_shared.faults import RequestInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.contract.http.test_scores import loaded, save_random
from tests.models.test_encoders import MODERN, SIZES
from tests.support.grpc_api import open_client
from tests.support.openai_api import OpenAIApi, answer_of, assert_close, open_api
from tests.support.tiny import VOCAB, World
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAMILIES: dict[str, Any] = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.XLMRobertaConfig(**SIZES),
    "modern": transformers.ModernBertConfig(
        **(
            SIZES
            | MODERN["odd"]
            | {"local_attention": 16, "classifier_bias": True, "classifier_pooling": "mean"}
        )
    ),
    "bare": transformers.ModernBertConfig(**(SIZES | {"local_attention": 16})),
}
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "LOC"]
TAGGERS: dict[str, dict[str, Any]] = {
    "names": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["classifier"]},
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["query", "Wqkv", "output.dense", "mlp.Wo"]},
}
TOPIC: dict[str, Any] = {"r": 2, "target_modules": "all-linear"}
"""One that labels whole texts."""
TEXTS = [
    "Ada  Lovelace wrote it in London, on 12 May-June.",
    "abc",
    "A caféé \U0001f600 by the sea",
    "",
    " Byron's ab ab abab",
]
STRATEGIES = ["none", "simple", "first", "average", "max"]


def pieces(family: str) -> Tokenizer:
    """A tokenizer of single characters, as the family has them: word pieces, a unigram model or bytes."""
    special, letters = ["<0>", "<1>", "<2>", "<3>"], [chr(32 + number) for number in range(94)]
    if family == "bert":
        vocab = [*special, *letters[1:], *(f"##{each}" for each in letters[1:])]
        ids = {each: place for place, each in enumerate(vocab)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="<3>"))  # noqa: S106 - a token of text
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    elif family == "roberta":
        vocab = [*special, "\N{LOWER ONE EIGHTH BLOCK}", *letters[1:], "ab", "\N{LOWER ONE EIGHTH BLOCK}ab"]
        scores = [(each, -float(place)) for place, each in enumerate(vocab)]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        alphabet = [each for each in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(each) < 300][
            : VOCAB - 6
        ]
        vocab = [*special, *alphabet, "ab"]
        ids = {each: place for place, each in enumerate(vocab)}
        tokenizer = Tokenizer(models.BPE(ids, [("a", "b")], unk_token="<3>"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(single="<0> $A <2>", special_tokens=[("<0>", 0), ("<2>", 2)])
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[World, MemoryStore]:
    """A base with taggers, one of which has names for its labels."""
    root, family = tmp_path_factory.mktemp("tokens"), request.param
    base, config = root / "base", FAMILIES[family]
    torch.manual_seed(0)
    modern = config.model_type == "modernbert"
    kind = transformers.AutoModelForMaskedLM if modern else transformers.AutoModel
    save_random(kind.from_config(config), base, 0)
    pieces(family).save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"unk_token": "<3>"}')
    for seed, (name, options) in enumerate(TAGGERS.items()):
        save_random(
            get_peft_model(tagger(base, num_labels=len(NAMES)), LoraConfig(task_type="TOKEN_CLS", **options)),
            root / name,
            seed,
        )
        spread(tagger(base, num_labels=len(NAMES)), root / name)
    save_random(get_peft_model(loaded(base, 3), LoraConfig(task_type="SEQ_CLS", **TOPIC)), root / "topic", 9)
    (root / "names" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(NAMES))}))
    world = World(base, {name: root / name for name in (*TAGGERS, "topic")}, root)
    return world, world.built()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(made: tuple[World, MemoryStore]) -> AsyncIterator[OpenAIApi]:
    async with open_api(made, max_batch_tokens=100) as opened:
        yield opened


def tagger(base: Path, **fields: Any) -> Any:
    kind = transformers.AutoModelForTokenClassification
    return kind.from_pretrained(base, dtype=torch.float32, **fields)


def spread(whole: Any, folder: Path) -> None:
    """Scale the head of a saved tagger so that every label is the best one of some tokens of the texts."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ids = [[0, *pieces_of(folder.parent / "base", text), 2] for text in TEXTS]
    whole = PeftModel.from_pretrained(whole, folder).eval()
    with torch.no_grad():
        logits = torch.cat([whole(torch.tensor([each])).logits[0] for each in ids])
    weight, bias = (tensors[f"base_model.model.classifier.{name}"] for name in ("weight", "bias"))
    scale = 2 / logits.std(0)
    bias.sub_(logits.mean(0)).mul_(scale)
    weight.mul_(scale[:, None])
    save_file(tensors, folder / "adapter_model.safetensors")


def pieces_of(base: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(base / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def pipeline_of(world: World, name: str) -> TokenClassificationPipeline:
    """Return transformers' pipeline of an adapter under PEFT, or of the base."""
    if name in world.adapters:
        whole = (
            PeftModel.from_pretrained(tagger(world.base, num_labels=len(NAMES)), world.adapters[name])
            .eval()
            .base_model.model
        )
    else:
        whole = tagger(world.base).eval()
    if name == "names":
        whole.config.id2label = dict(enumerate(NAMES))
    special = {"unk_token": "<3>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(world.base / "tokenizer.json"), **special)
    return TokenClassificationPipeline(model=whole, tokenizer=tokenizer)


@pytest.mark.parametrize("name", TAGGERS)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
async def test_entities_equal_those_of_the_pipeline(
    made: tuple[World, MemoryStore], api: OpenAIApi, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, words and characters are the same with every strategy, and scores within 1e-5."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the pipeline sets it where it is not
    oracle = pipeline_of(made[0], name)
    for how in STRATEGIES:
        for more in ({}, {"ignore_labels": []}):
            found = await answer_of(api, "/classify", model=name, input=TEXTS, aggregation_strategy=how, **more)
            entities = [each for text in found["data"] for each in text["entities"]]
            expected = [each for text in TEXTS for each in oracle(text, aggregation_strategy=how, **more)]
            assert_close([each.pop("score") for each in entities], [each.pop("score") for each in expected])
            assert entities == expected
            assert len(entities) > 2 * len(TEXTS)
            if how == "none" and more:
                assert len({each["entity"] for each in entities}) == len(NAMES)


class FirstSteps:
    """Notes when the first step of each request was submitted."""

    def __init__(self) -> None:
        self.began_s: list[float | None] = []

    def began(self, record: RequestRecord) -> None:
        """Ignore it: a vector has no first token."""

    def emitted(self, record: RequestRecord, delta: AnswerDelta) -> None:
        """Ignore it: a vector has no text."""

    def ended(self, record: RequestRecord) -> None:
        self.began_s.append(record.began_s)


async def test_several_models_answer_one_call_in_one_batch(
    made: tuple[World, MemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is what its model alone answers, and one step computes the rows of all."""
    models, body = ["names", "topic", "plain"], {"input": TEXTS[1:], "aggregation_strategy": "first"}
    async with open_api(made, max_batch_tokens=1000) as api:
        alone = [await answer_of(api, "/classify", **body | {"model": model}) for model in ("names", "plain")]
        alone.insert(1, await answer_of(api, "/classify", model="topic", input=body["input"]))
        steps, service = FirstSteps(), api.ready.service
        monkeypatch.setattr(service, "watchers", (*service.watchers, steps))
        await api.ready.engine.pause()
        asking = asyncio.create_task(api.post("/classify", model=models, **body))
        await until(lambda: service.in_work == len(models) * len(TEXTS[1:]), "all rows to wait")
        api.ready.engine.resume()
        together = (await asking).json()
        assert together["model"] == models
        assert together["usage"]["prompt_tokens"] == sum(each["usage"]["prompt_tokens"] for each in alone)
        for part, expected in zip(together["data"], alone, strict=True):
            assert (part["model"], part["usage"]) == (expected["model"], expected["usage"])
            numbers, others = ([*map(numbers_of, each["data"])] for each in (part, expected))
            assert_close([*chain(*numbers)], [*chain(*others)])
            assert part["data"] == expected["data"]
        assert len(steps.began_s) == len(models) * len(TEXTS[1:])
        assert len(set(steps.began_s)) == 1
        for wrong, part in ((["names", "base"], "base"), ([], "model"), (["topic"] * 65, "model")):
            answer = await api.post("/classify", model=wrong, **body)
            assert (answer.status_code, part in answer.text) == (400, True)
        answer = await api.post("/classify", model=["topic"] * 64, input=["a"] * 33)
        assert "at most 2048" in answer.text


def numbers_of(text: dict[str, Any]) -> list[float]:
    """Take the numbers out of an answer about a text."""
    return text.pop("probs", None) or [each.pop("score") for each in text["entities"]]


async def test_predict_answers_as_text_embeddings_inference(api: OpenAIApi) -> None:
    """A text has a list, lists of texts have one each; labels come best first, and tokens as entities."""
    text, pair = "abc", ["abc", "by the sea"]
    [known] = (await answer_of(api, "/classify", model="topic", input=text))["data"]
    found = (await api.post("/predict", model="topic", inputs=text)).json()
    assert_close([each["score"] for each in found], sorted(known["probs"], reverse=True))
    assert found[0]["label"] == known["label"]
    several = (await api.post("/predict", model="topic", inputs=[[text], pair])).json()
    assert_close([each["score"] for each in several[0]], [each["score"] for each in found])
    one = (await api.post("/predict", model="topic", inputs=pair, raw_scores=True)).json()
    assert [each["label"] for each in one] == [each["label"] for each in several[1]]
    assert one[0]["score"] == max(each["score"] for each in one)
    [tagged] = (await answer_of(api, "/classify", model="plain", input=text, aggregation_strategy="first"))[
        "data"
    ]
    body = {"model": "plain", "inputs": [[text]], "aggregation_strategy": "first"}
    assert (await api.post("/predict", **body)).json() == [tagged["entities"]]
    options = {"aggregation_strategy": "first", "ignore_labels": []}
    [known] = (await answer_of(api, "/classify", model="plain", input=text, **options))["data"]
    assert (await api.post("/predict", model="plain", inputs=text, parameters=options)).json() == known[
        "entities"
    ]
    cut = {"model": "plain", "inputs": "c" * 90 + text, "truncate": True, "parameters": {"ignore_labels": []}}
    left = (await api.post("/predict", **cut, truncation_direction="Left")).json()
    assert left[-1]["end"] == len(cut["inputs"])
    assert (await api.post("/predict", **cut)).json()[0]["start"] == 0 < left[0]["start"]
    rows = (await answer_of(api, "/pooling", model="plain", input=text, task="token_classify"))["data"][0][
        "data"
    ]
    entities = await answer_of(api, "/classify", model="plain", input=text, ignore_labels=[])
    for each in entities["data"][0]["entities"]:
        assert_close(max(rows[each["index"]]), each["score"])
    long = {"model": "topic", "inputs": "a" * 90}
    assert (await api.post("/predict", **long)).status_code == 400
    assert len((await api.post("/predict", **long, truncate=True)).json()) == 3
    for more, part in (
        ({"inputs": pair}, "found two texts"),
        ({"raw_scores": True}, "raw_scores"),
        ({"inputs": [["a", "b", "c"]]}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"model": "base"}, "model"),
    ):
        answer = await api.post("/predict", **body | more)
        assert (answer.status_code, part in answer.json()["error"]["message"]) == (400, True), answer.text


async def test_what_does_not_fit_tokens_is_refused(api: OpenAIApi) -> None:
    """Scores of whole texts, text, token ids and raw scores are refused by name, and long texts unless cut."""
    for path, body, part in (
        ("/score", {"text_1": "a", "text_2": "b"}, "POST /classify"),
        ("/rerank", {"query": "a", "documents": ["b"]}, "POST /classify"),
        ("/v1/completions", {"prompt": "a"}, "one that classifies tokens"),
        ("/classify", {"input": [[5, 6]]}, "input: expected a text"),
        ("/classify", {"input": "a", "use_activation": False}, "use_activation"),
        ("/classify", {"input": "a", "aggregation_strategy": "median"}, "aggregation_strategy"),
        ("/classify", {"input": "a" * 70}, "at most 6"),
        ("/classify", {"input": "a", "model": "base", "ignore_labels": []}, "model"),
    ):
        answer = await api.post(path, **{"model": "plain"} | body)
        assert answer.status_code == 400, path
        assert part in answer.json()["error"]["message"]
    cut = {"model": "plain", "input": "a" * 70, "truncate_prompt_tokens": 6, "ignore_labels": []}
    whole = await answer_of(api, "/classify", **cut)
    assert [each["index"] for each in whole["data"][0]["entities"]] == [1, 2, 3, 4]
    async with open_client(api.ready) as client:
        with pytest.raises(RequestInvalid, match="POST /classify"):
            await client.classify("plain", ["a"])
        served = {each.name: (each.kinds, each.num_labels) for each in await client.models()}
    assert served["plain"] == (("lora", "token-classifier"), 5)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("family", ["roberta", "bare"])
async def test_a_base_labels_tokens_itself(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's own head needs no adapter, and the hub's client names none."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    save_random(
        transformers.AutoModelForTokenClassification.from_config(FAMILIES[family]), tmp_path / "base", 0
    )
    pieces(family).save(str(tmp_path / "base" / "tokenizer.json"))
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"unk_token": "<3>"}')
    world = World(tmp_path / "base", {}, tmp_path)
    oracle = pipeline_of(world, "base")
    async with open_api((world, world.built())) as api:
        found = await answer_of(api, "/classify", model="base", input=TEXTS[0], aggregation_strategy="first")
        client = AsyncInferenceClient(model=f"{api.url}/predict")
        tagged = await client.token_classification(TEXTS[0], aggregation_strategy="first")
    expected = oracle(TEXTS[0], aggregation_strategy="first")
    [text] = found["data"]
    assert [each.word for each in tagged] == [each["word"] for each in text["entities"]]
    assert_close([each.pop("score") for each in text["entities"]], [each.pop("score") for each in expected])
    assert text["entities"] == expected
