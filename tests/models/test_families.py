"""Every family of decoders against transformers and PEFT, token for token in float32, on tiny random models."""

import copy
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.engine import Engine
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.bank import OpenBank
from inference_service.startup.base import LoadedBase
from inference_service.startup.engine import NewRunner, build_engine
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.memory import count_weights
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.bundle.generation import Generation
from loramux_shared.faults import CheckpointInvalid, SettingsInvalid
from loramux_shared.settings import InferenceSettings
from scripts.models_doc import COUNTED
from tests.models.poisoned_caches import Build, load_poisoned
from tests.models.test_merge import ready_of
from tests.support import tiny
from tests.support.cases import cases
from tests.support.greedy import choices_and_logprobs, greedy_tokens
from tests.support.thread_ranks import run_in_ranks
from tests.support.tiny import (
    ADAPTERS,
    SIZES,
    VOCAB,
    Replica,
    World,
    make_checkpoint,
    make_world_of,
    oracle,
    oracle_tokens,
    run_engine,
)

NEW = 14
SNAPSHOTS = 2
"""Snapshots of states, where layers carry some: for a cache as small as that of the test below."""
PARTS: dict[str, dict[str, Any]] = {"sizes": SIZES, **cases(__file__, "parts")}
"""Fields of configs that several cases have."""
ALL = {"all": ADAPTERS["all"]}
"""For what a family does otherwise with its positions, windows or biases alone."""
SETS: dict[str, dict[str, dict[str, Any]]] = {"default": ADAPTERS, "all": ALL, **cases(__file__, "adapters")}
"""Adapters by name, in sets."""


@dataclass(frozen=True)
class Case:
    """A checkpoint of a family."""

    config: PreTrainedConfig
    written: dict[str, Any]
    """The fields that the config was made of."""
    adapters: Mapping[str, Mapping[str, Any]]
    max_seq_len: int | None = None
    shortest: int = 1
    """Tokens of the shortest prompt."""
    stepwise: bool = False
    """True if keys are rotated otherwise as the sequence grows, so that only steps of transformers answer."""
    mamba: bool = False
    """True for layers of Mamba-2, which one rank alone computes, and which have no proofs."""


def _fields(written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config in the file: those of its parts, and its own."""
    fields = {key: value for part in written.get("parts", ()) for key, value in PARTS[part].items()}
    own = {key: _fields(value) if isinstance(value, dict) else value for key, value in written.items()}
    return {key: value for key, value in (fields | own).items() if key != "parts"}


def _case(row: dict[str, Any]) -> Case:
    written = _fields(row.pop("config"))
    config = getattr(transformers, row.pop("class"))(**copy.deepcopy(written))
    return Case(config, written, SETS[row.pop("adapters")], **row)


CASES = {name: _case(row) for name, row in cases(__file__, "cases").items()}


@pytest.mark.parametrize("name", CASES)
def test_fields_that_are_left_out_mean_what_transformers_takes_them_for(name: str) -> None:
    """Fields that no case has, each that this one has, and all have the values of the class, or are missed."""
    case = CASES[name]
    named = {"architectures": [_architecture(case)], "model_type": case.config.model_type}
    written = named | case.written
    assert isinstance(_read(written), ModelConfig)
    for fields in (named, written, *(named | less for less in _less(case.written))):
        try:
            whole = type(case.config)(**copy.deepcopy(fields)).to_dict()
        except (StrictDataclassError, LookupError, ArithmeticError):
            continue  # transformers does not read the others without it
        found = _read(fields)
        assert found == _read(whole) or str(found).startswith("None"), fields


def test_answers_of_every_family_are_counted() -> None:
    """The counts on the page of models are of all families that have a case here."""
    counted, families = {row[0] for row in json.loads(COUNTED.read_text())["counts"]}, load_families()
    for case in CASES.values():
        _, family = families[_architecture(case)]
        assert counted & {architecture.name for architecture in family.architectures}


def _architecture(case: Case) -> str:
    found = load_families().items()
    return next(name for name, (each, _) in found if each.model_type == case.config.model_type)


def _less(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield fields without each one, and without each within it."""
    for key, value in fields.items():
        yield {name: other for name, other in fields.items() if name != key}
        if isinstance(value, dict) and key != "vision_config":
            yield from ({**fields, key: less} for less in _less(value))


def _read(fields: Mapping[str, Any]) -> ModelConfig | str:
    """Return a base without its ends, which no class decides, or the end of what it is refused for."""
    try:
        return replace(read_fields(json.loads(json.dumps(fields))), eos_token_ids=frozenset())
    except CheckpointInvalid as refused:
        return refused.message.rpartition("found ")[2]


def _swept_but(*names: str) -> list[Any]:
    """All cases; only those of these names are tried without a sweep."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.sweep) for name in CASES]


def _may_be_proved(case: Case) -> bool:
    text, experts = case.config.get_text_config(), ("num_experts", "num_local_experts")
    if case.mamba or getattr(text, "hidden_act", None) in ("relu2", "xielu"):
        return False
    return not any(getattr(text, key, None) for key in experts)


PROVED = [name for name, case in CASES.items() if _may_be_proved(case)]
KERNELS = _swept_but("gemma4-small", "olmo2", "ministral3", "phi2", "gpt-oss", "falcon-h1", "llama4")
"""The others have ropes, windows and norms that kernels see in these too."""
CACHES = _swept_but(
    "llama-dynamic", "mistral", "qwen2-windows", "gemma4-small", "gemma4-images", "phi3-long", "gpt-oss",
    "qwen3_5-images", "granite-4", "falcon-h1",
)  # fmt: skip
"""One case of those whose caches keep the same of a token."""
HALVES = _swept_but(
    "qwen2", "gemma2", "gemma4-small", "gemma4-images", "phi4-mini", "granite", "olmo2", "gpt-oss",
    "qwen3_5-moe", "granite-4",
)  # fmt: skip
"""One case of those whose sums, norms and caps are the same."""


@dataclass(frozen=True)
class Answers(tiny.Answers):
    """The engine's first answers, and the log probabilities of transformers for its own tokens."""

    found: list[list[int]]
    """Base and adapters in one batch, prompts whole."""
    found_logprobs: list[float]
    """Log probabilities of the tokens of the base's first answer."""
    logprobs: list[float]
    """The same by transformers."""


@pytest.fixture(scope="module", params=CASES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    case = CASES[request.param]
    world = make_world_of(
        tmp_path_factory.mktemp("family"), case.config, case.adapters, max_seq_len=case.max_seq_len
    )
    store = world.built()
    draw = random.Random(7)
    lengths = [max(case.shortest, length) for length in (57, 40, 33, 1, 17, 16, 64, 26)]
    models = ("base", *case.adapters)
    requests = [
        (models[index % len(models)], [draw.randrange(3, VOCAB) for _ in range(length)])
        for index, length in enumerate(lengths)
    ]
    ready = world.load(store)
    found = run_engine(ready, requests, NEW)
    oracles = {name: oracle(world.base, world.adapters.get(name)) for name in models}
    expected = [
        oracle_tokens(oracles[name], prompt, NEW)
        if case.stepwise
        else greedy_tokens(oracles[name], prompt, guess)
        for (name, prompt), guess in zip(requests, found, strict=True)
    ]
    _, logprobs = choices_and_logprobs(oracles["base"], requests[0][1], expected[0])
    found_logprobs = _engine_logprobs(ready, requests[0][1])
    return Answers(world, store, requests, expected, found, found_logprobs, logprobs)


def test_a_mixed_batch_equals_transformers(answers: Answers) -> None:
    """One batch gives transformers' tokens and log probabilities, also in chunks, with NaN in unused cache."""
    assert answers.found == answers.expected
    assert answers.found_logprobs == pytest.approx(answers.logprobs, abs=2e-4)
    ready = load_poisoned(answers.world, answers.store, max_batch_tokens=16)
    assert run_engine(ready, answers.requests, NEW) == answers.expected


def test_two_ranks_answer_the_same(answers: Answers, request: pytest.FixtureRequest) -> None:
    """Two ranks give the tokens of one, or refuse Mamba-2 mixers by name."""
    refused = CASES[request.node.callspec.params["answers"]].mamba
    ready = answers.world.load(answers.store, max_batch_tokens=16)
    expected = pytest.raises(SettingsInvalid, match=r"(a Mamba-2 mixer|an MLP alone), which is served by one")
    with (
        expected if refused else nullcontext(),
        run_in_ranks(ready, answers.world.base, answers.store) as ranks,
    ):
        assert run_engine(ranks, answers.requests, NEW) == answers.expected


@pytest.mark.parametrize("answers", KERNELS, indirect=True)
def test_the_kernels_for_gpus_answer_the_same(answers: Answers) -> None:
    """Interpreted kernels answer the same past blocks and windows, with NaN in unused cache; no chunks."""
    settings: dict[str, Any] = {"backend": "triton", "max_batch_tokens": 32}
    if any(mixer.attention.tumbling for mixer in read_config(answers.world.base).attentions):
        with pytest.raises(SettingsInvalid, match="max_seq_len to at most 24"):
            answers.world.load(answers.store, **settings)
        return
    ready = load_poisoned(answers.world, answers.store, **settings)
    picked = [(answers.requests[index], answers.expected[index]) for index in (2, 3, 4)]
    found = run_engine(ready, [request for request, _ in picked], 2)
    assert found == [expected[:2] for _, expected in picked]


def tight(world: World, sequences: int, least: int = 64) -> dict[str, Any]:
    """Settings with a cache that has no room for so many sequences, but for one of at least so many tokens."""
    config = read_config(world.base)
    token_bytes = 4 * sum(layer.mixer.cached_features for layer in config.layers)
    # where all layers slide, one sequence holds little, and a step of few rows is enough for it
    tokens, rows = (152, 1024) if None in config.windows else (least, 16)
    states = (sequences + SNAPSHOTS) * config.state_bytes(4)
    return {
        "kv_memory_gb": (tokens * token_bytes + states) / 1e9,
        "block_size": 8,
        "max_batch_tokens": rows,
        "max_batch_seqs": sequences,
    }


@pytest.mark.parametrize("answers", CACHES, indirect=True)
def test_preemption_and_prefix_hits_change_no_token(answers: Answers) -> None:
    """A cache too small for all changes no token, nor does a second run with the prefixes left in it."""
    windows = read_config(answers.world.base).windows
    build: Build = build_engine
    if len(windows) > 1:  # for which a plan has more tokens of everything in as many bytes
        build = partial(build_evenly, (152 if None in windows else 64) // 8)
    sizes = tight(answers.world, len(answers.requests))
    ready = load_poisoned(answers.world, answers.store, build, **sizes)
    assert run_engine(ready, answers.requests, NEW) == answers.expected
    assert ready.core.stats.preemptions > 0
    for _ in range(2):  # alone, so that nobody needs its blocks meanwhile
        assert run_engine(ready, answers.requests[:1], NEW) == answers.expected[:1]
    assert ready.core.stats.prefix_tokens_hit > 0


def build_evenly(
    blocks: int,
    settings: InferenceSettings,
    generation: Generation,
    base: LoadedBase,
    bank: OpenBank,
    new_runner: NewRunner,
) -> tuple[Engine, SchedulerLimits]:
    """Build an engine with as many blocks of 8 tokens for each group of layers."""
    _, limits = build_engine(settings, generation, base, bank)
    limits = replace(limits, max_seq_len=8 * blocks)
    runner = new_runner(base, bank.lora, blocks, 8, limits, 0)
    return Engine(runner, limits, BlockManager(blocks, 8, base.config.windows), bank.residency), limits


@pytest.mark.parametrize(
    ("settings", "within"),
    [({"dtype": "bfloat16"}, 0.5), ({"backend": "torch", "device": "cpu", "kv_cache_dtype": "int8"}, 0.2)],
    ids=["bfloat16", "a cache of 8 bits"],
)
@pytest.mark.parametrize("answers", HALVES, indirect=True)
def test_fewer_bits_stay_close(answers: Answers, settings: dict[str, Any], within: float) -> None:
    """Rounding changes these random models by up to 0.14, another head's cache scales by up to 1.9."""
    ready = load_poisoned(answers.world, answers.store, **settings)
    found = _engine_logprobs(ready, answers.requests[0][1], new=1)
    assert found == pytest.approx(answers.logprobs[:1], abs=within)


@pytest.mark.parametrize(("dtype", "max_shard_size"), [("bfloat16", "40KB"), ("float16", "1GB")])
def test_other_types_and_shards_give_the_same_tokens(tmp_path: Path, dtype: str, max_shard_size: str) -> None:
    """Weights in half precision are widened without loss, and found in whichever file they are."""
    case = CASES["qwen2"]
    make_checkpoint(tmp_path / "base", case.config, getattr(torch, dtype), max_shard_size)
    assert (tmp_path / "base" / "model.safetensors").exists() == (max_shard_size == "1GB")
    world = World(tmp_path / "base", {}, tmp_path)
    prompt = list(range(3, 40))
    expected = oracle_tokens(oracle(world.base, None), prompt, NEW)
    assert run_engine(world.load(world.built()), [("base", prompt)], NEW) == [expected]


def test_the_memory_plan_counts_what_tokens_give_to_layers() -> None:
    """The table is most of a small Gemma 4: all that transformers holds but norms and biases."""
    config = CASES["gemma4-small"].config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    fields = config.to_dict() | {"architectures": ["Gemma4ForCausalLM"]}
    assert count_weights(read_fields(fields)) == counted


def test_undescribed_and_missing_tensors_are_refused_by_name(tmp_path: Path) -> None:
    """Bytes without their scales would be served as nonsense, and an untied head is not to be guessed."""
    make_checkpoint(tmp_path, CASES["qwen2"].config)
    device = torch.device("cpu")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(CheckpointInvalid, match=r"model\.norm\.weight: float8_e4m3fn is not supported"):
        Decoder(read_config(tmp_path), Checkpoint(tmp_path, torch.float32, device))
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, file)
    with pytest.raises(CheckpointInvalid, match=r"lacks the tensor lm_head\.weight"):
        Decoder(read_config(tmp_path), Checkpoint(tmp_path, torch.float32, device))


def test_tensors_that_a_config_does_not_describe_are_refused_by_name(tmp_path: Path) -> None:
    """A base whose biases its config leaves out would answer without them; biases of zeros change nothing."""
    base = tmp_path / "base"
    make_checkpoint(base, CASES["llama-dynamic"].config)
    world, file = World(base, {}, tmp_path), base / "model.safetensors"
    tensors = load_file(file)
    bias = {f"model.layers.{index}.mlp.down_proj.bias": torch.zeros(SIZES["hidden_size"]) for index in (0, 1)}
    save_file(tensors | bias, file)
    world.load(world.built())
    bias["model.layers.1.mlp.down_proj.bias"][3] = 1e-3
    save_file(tensors | bias, file)
    expected = (
        r"1 tensor that LlamaForCausalLM does not use .*: model\.layers\.1\.mlp\.down_proj\.bias\. Correct"
    )
    with pytest.raises(CheckpointInvalid, match=expected):
        world.load(world.built())


@pytest.mark.parametrize("answers", _swept_but("qwen3_5-images", "granite-4"), indirect=True)
def test_a_merged_adapter_equals_transformers(answers: Answers) -> None:
    """Merged weights answer as the adapter does, also in delta rules' slices and queries with gates."""
    pairs = zip(answers.requests, answers.expected, strict=True)
    requests, expected = zip(*(pair for pair in pairs if pair[0][0] == "all"), strict=True)
    ready = ready_of(answers.world, "all", {"serve_base": False})
    assert run_engine(ready, list(requests), NEW) == list(expected)


def _engine_logprobs(ready: Replica, prompt: list[int], new: int = NEW) -> list[float]:
    engine = ready.core
    engine.add(Sequence("0", list(prompt), SamplingParams(max_tokens=new, logprobs=1)))
    found: list[float] = []
    while not engine.idle:
        found += [output.token.logprob for output in engine.step() if output.token is not None]
    return found
