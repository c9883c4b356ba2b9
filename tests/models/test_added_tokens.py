"""Adapters whose tokenizer has more tokens than the base's, token for token against PEFT in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from inference_service.engine.scheduling.queues import SchedulerLimits
from loramux_shared.bundle.deployments import current_generation
from loramux_shared.bundle.manifest import OWN_TOKENS_FILE
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.faults import AdapterInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.support.openai_api import open_api
from tests.support.recorded import runner_of, with_runner
from tests.support.tiny import SIZES, VOCAB, World, make_checkpoint, oracle, oracle_tokens, run_engine

NEW = 12
BASE = VOCAB + 5
"""Rows of the base, five of them without a token."""
ADDED = ("<|im_start|>", "<|im_end|>", "<tool>")
WHOLE = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (BASE, {"target_modules": ["q_proj", "v_proj"]}),
    "more": (VOCAB + len(ADDED), WHOLE),
    "beside": (VOCAB + 40, {"target_modules": ["k_proj"]}),
    "fewer": (VOCAB, WHOLE),
}
"""The number of tokens of each adapter's model, and its config."""
MODELS = ("base", *ADAPTERS)


def tokenizer_of(base: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))


def make(base: Path, folder: Path, seed: int, vocab: int, **config: Any) -> None:
    """Save an adapter of a model that was resized, with random factors and rows, of new tokens large ones."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocab != BASE:
        model.resize_token_embeddings(vocab)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_" in name:
                parameter.copy_(noise * 0.2)
            elif vocab != BASE and ("embed_tokens" in name or "lm_head" in name) and "original" not in name:
                parameter[VOCAB:] = noise[VOCAB:]
    model.save_pretrained(folder)


def resized(world: World, name: str) -> Any:
    """The model of an adapter as transformers and PEFT run it."""
    vocab = ADAPTERS.get(name, (BASE, {}))[0]
    if vocab == BASE:
        return oracle(world.base, world.adapters.get(name))
    model: Any = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model.resize_token_embeddings(vocab)
    return PeftModel.from_pretrained(model, world.adapters[name]).eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("added")
    make_checkpoint(root / "base", LlamaConfig(**SIZES | {"vocab_size": BASE}))
    for seed, (name, (vocab, config)) in enumerate(ADAPTERS.items()):
        make(root / "base", root / name, seed, vocab, **config)
    tokenizer = tokenizer_of(root / "base")
    tokenizer.add_tokens(list(ADDED[:2]), special_tokens=True)
    tokenizer.add_tokens([ADDED[2]])
    tokenizer.eos_token = ADDED[1]
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(root / "more")
    return World(root / "base", {name: root / name for name in ADAPTERS}, root)


def requests_of(name: str) -> list[tuple[str, list[int]]]:
    """Two prompts, of which every third token is one of the last that the model has."""
    vocab = ADAPTERS.get(name, (BASE, {}))[0]
    return [
        (
            name,
            [3 + (at * 17 + place * 5) % 150 if at % 3 else vocab - 1 - at % 3 for at in range(3 + 9 * place)],
        )
        for place in (0, 2)
    ]


REQUESTS = [request for name in MODELS for request in requests_of(name)]


@pytest.fixture(scope="module")
def expected(world: World) -> list[list[int]]:
    """The answers of PEFT, with tokens that the base does not have among them."""
    models = {name: resized(world, name) for name in MODELS}
    answers = [oracle_tokens(models[name], prompt, NEW) for name, prompt in REQUESTS]
    by_model = {name: set[int]() for name in MODELS}
    for (name, _), answer in zip(REQUESTS, answers, strict=True):
        by_model[name] |= set(answer)
    assert max(by_model["more"]) >= VOCAB
    assert max(by_model["beside"]) >= BASE
    return answers


@pytest.mark.parametrize(
    "settings",
    [{}, {"native": False, "max_batch_tokens": 16}, {"deterministic": True}],
    ids=["compiled", "torch, in chunks", "deterministic"],
)
def test_a_mixed_batch_equals_peft(
    world: World, store: MemoryStore, expected: list[list[int]], settings: dict[str, Any]
) -> None:
    """Vocabularies of four sizes in one batch, each with its own tokens alone."""
    assert run_engine(world.load(store, **settings), REQUESTS, NEW) == expected


def test_the_kernels_for_gpus_answer_the_same(
    world: World, store: MemoryStore, expected: list[list[int]]
) -> None:
    """Static buffers have room for more tokens than the base has, and nothing of them is left for others."""
    ready = world.load(store, backend="triton")
    limits = SchedulerLimits(max_tokens=8, max_seqs=2, max_adapters=2, max_seq_len=32)
    replayed = with_runner(ready, runner_of(ready, limits, 8), limits, 8)
    base, beside = REQUESTS[0], REQUESTS[2 * MODELS.index("beside")]
    first = {request[0]: answer[:2] for request, answer in zip(REQUESTS[::2], expected[::2], strict=True)}
    assert run_engine(replayed, [beside, base], 2) == [first["beside"], first["base"]]
    added = range(BASE, BASE + 3)
    [drawn] = run_engine(replayed, [beside], 2, logit_bias=dict.fromkeys(added, 100.0))
    assert {*drawn} <= {*added}
    assert run_engine(replayed, [base], 2) == [first["base"]]


def test_bundles_say_what_they_have(store: MemoryStore) -> None:
    """Tokens and vocabulary stand where the tokenizer or the matrices are others than the base's."""
    generation = current_generation(store, "tiny")
    manifests = {name: read_manifest(store, record.digest) for name, record in generation.adapters.items()}
    assert {name: manifest.vocab for name, manifest in manifests.items()} == {
        "plain": None, "more": VOCAB + 3, "beside": VOCAB + 40, "fewer": VOCAB
    }  # fmt: skip
    assert [name for name, each in manifests.items() if OWN_TOKENS_FILE not in each.files] == ["plain"]
    assert {each.format_version for name, each in manifests.items() if name != "plain"} == {2}
    assert [generation.adapters[name].apart != "" for name in ("plain", "more", "fewer")] == [False, True, True]


async def test_apis_speak_its_tokens(world: World, store: MemoryStore) -> None:
    """Prompts, answers, scores, grammars and bounds of a model are in its tokens, of others in the base's."""
    async with open_api((world, store)) as api:
        ids = {text: VOCAB + at for at, text in enumerate(ADDED)}
        mine, base = {"model": "more"}, {"model": "base"}
        for model, tokens in ((mine, [ids["<tool>"], 68]), (base, [31, 87, 82, 82, 79, 33, 68])):
            fields = {"prompt": "<tool>a", "max_tokens": 1, "return_token_ids": True}
            [read] = (await api.post("/v1/completions", **fields, **model)).json()["choices"]
            assert read["prompt_token_ids"] == tokens
        foreign = await api.post("/v1/completions", prompt=[BASE], **base)
        assert foreign.status_code == 400
        assert f"ids from 0 to {BASE - 1}" in foreign.json()["error"]["message"]
        requests = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "temperature": 0}
        chat = (await api.post("/v1/chat/completions", return_token_ids=True, **mine, **requests)).json()
        assert chat["prompt_token_ids"] == [ids["<|im_start|>"], 68, 69, ids["<|im_end|>"]]
        bias = {"logit_bias": {str(ids["<tool>"]): 100}, "max_tokens": 2, "logprobs": 1}
        parsed = (await api.post("/v1/completions", prompt="a", **mine, **bias)).json()["choices"][0]
        assert (parsed["text"], parsed["logprobs"]["tokens"]) == ("<tool><tool>", ["<tool>", "<tool>"])
        ended = await api.post(
            "/v1/completions", prompt="a", logit_bias={str(ids["<|im_end|>"]): 100}, max_tokens=3, **mine
        )
        assert (ended.json()["choices"][0]["text"], ended.json()["choices"][0]["finish_reason"]) == ("", "stop")
        choice = {"structured_outputs": {"choice": ["x<tool>"]}, "max_tokens": 9, "return_token_ids": True}
        for model, tokens in ((mine, [91, ids["<tool>"]]), (base, [91, 31, 87, 82, 82, 79, 33])):
            made = (await api.post("/v1/completions", prompt="a", **model, **choice)).json()["choices"][0]
            assert (made["text"], made["token_ids"][: len(tokens)]) == ("x<tool>", tokens)
        mixed = await api.post("/v1/completions", prompt="a", model="more*0.5+plain")
        assert (mixed.status_code, "a vocabulary of its own" in mixed.text) == (400, True)


@pytest.mark.parametrize(
    ("vocab", "config", "why"),
    [
        (BASE + 3, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "as many rows"),
        (BASE + 3, {"target_modules": ["q_proj", "embed_tokens"]}, "the base has"),
        (VOCAB - 1, WHOLE | {"target_modules": ["o_proj"]}, f"at least {VOCAB}"),
    ],
    ids=["the head stays random", "factors beside new rows", "a token of the base is cut off"],
)
def test_what_cannot_be_known_is_refused(world: World, vocab: int, config: dict[str, Any], why: str) -> None:
    """New rows that no file has, or that would have factors too."""
    folder = world.root / config["target_modules"][-1]
    make(world.base, folder, 7, vocab, **config)
    if vocab > BASE:
        saved = load_file(folder / "adapter_model.safetensors")
        retained = {
            name: tensor for name, tensor in saved.items() if "lm_head" not in name or "base_layer" in name
        }
        save_file(retained, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match="E_EMBED") as caught:
        World(world.base, {"odd": folder}, world.root).build(MemoryStore())
    assert any(why in f"{finding.expected} {finding.found}" for finding in caught.value.findings)


def test_new_tokens_without_rows_are_refused(world: World) -> None:
    """A tokenizer has tokens that neither the base nor the adapter has rows for."""
    folder = world.root / "without rows"
    make(world.base, folder, 7, BASE, target_modules=["q_proj"])
    tokenizer = tokenizer_of(world.base)
    tokenizer.add_tokens([*ADDED, "<4>", "<5>", "<6>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(AdapterInvalid) as caught:
        World(world.base, {"odd": folder}, world.root).build(MemoryStore())
    [finding] = caught.value.findings
    assert (finding.code, finding.where) == ("E_EMBED", "tokenizer.json")
    assert finding.found == f"<6> (id {BASE})"
