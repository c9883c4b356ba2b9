"""LORAMUX_DETERMINISTIC: the same answer, bit for bit, whatever happens around a request."""

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.backends.deterministic import agreeing_sizes
from inference_service.engine.layers.linear import SIZES as ROWS, in_pieces
from loramux_shared.faults import SettingsInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_families import CASES, PARTS, SETS
from tests.support.steps import engine_without_time
from tests.support.tiny import ADAPTERS, SIZES, VOCAB, Replica, World, make_world_of

NEW, SEQS = 17, 64
MODELS = ("base", *ADAPTERS)
DELTA_FIRST = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
WINDOWED = {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 24}
FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES | {"head_dim": 16}),
    "gemma2": transformers.Gemma2Config(
        **SIZES | WINDOWED | {"tie_word_embeddings": True},
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "granite": transformers.GraniteConfig(
        **SIZES, residual_multiplier=0.3, embedding_multiplier=3.0, logits_scaling=7.0
    ),
    "olmo2": transformers.Olmo2Config(**SIZES, pad_token_id=0),
    "phi2": transformers.PhiConfig(**SIZES, pad_token_id=0),
    "qwen3_5": transformers.Qwen3_5TextConfig(**SIZES | PARTS["qwen_delta"] | DELTA_FIRST, pad_token_id=0),
    "granite 4": CASES["granite-4"].config,
}
SWEPT = [
    ("llama", "bfloat16"), ("qwen3", "float32"), ("gemma2", "float32"), ("granite", "bfloat16"),
    ("olmo2", "float32"), ("granite 4", "float32"),
]  # fmt: skip
"""Families in a type whose operations others have in it."""


def of_families(*names: str) -> Any:
    """Try worlds of these families; of all in a sweep."""
    every = [name if name in names else pytest.param(name, marks=pytest.mark.sweep) for name in FAMILIES]
    return pytest.mark.parametrize("world", every, indirect=True)


Queries = list[tuple[str, list[int]]]


@pytest.fixture(scope="module", params=FAMILIES)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[World, MemoryStore]:
    """Return a family with every operation through which rows could affect each other."""
    adapters = SETS.get(request.param, ADAPTERS)
    world = make_world_of(tmp_path_factory.mktemp("world"), FAMILIES[request.param], adapters)
    return world, world.built()


def loaded(world: tuple[World, MemoryStore], **settings: Any) -> Replica:
    """A replica, or a skipped test where there is no C++ compiler."""
    try:
        return world[0].load(world[1], **{"deterministic": True, "prefix_cache": False} | settings)
    except SettingsInvalid as fault:
        if "no C++ compiler" in fault.message:
            pytest.skip(fault.message)
        raise


def answers(ready: Replica, query: Queries, **params: Any) -> list[list[Token]]:
    """The tokens of all, asked together, with their log probabilities and those of five others."""
    engine = ready.core
    sampling = SamplingParams(max_tokens=NEW, logprobs=5, **params)
    found: dict[str, list[Token]] = {}
    for number, (model, prompt) in enumerate(query):
        adapter = ready.service.local.catalog.get(model).adapter
        engine.add(Sequence(str(number), list(prompt), sampling, adapter))
        found[str(number)] = []
    while not engine.idle:
        for output in engine.step():
            assert output.token is not None
            found[output.seq_id] += [*output.prompt, output.token]
    return list(found.values())


@pytest.mark.parametrize(
    ("world", "dtype"),
    [
        pytest.param(name, dtype, marks=pytest.mark.sweep if (name, dtype) in SWEPT else ())
        for name in FAMILIES
        for dtype in ("bfloat16", "float32")
    ],
    indirect=["world"],
)
def test_nothing_around_a_request_changes_a_bit_of_its_answer(
    world: tuple[World, MemoryStore], dtype: str
) -> None:
    """Alone, in a crowd, in chunks, after prefix hits and after preemption: tokens and log probabilities."""
    draw = random.Random(5)
    requests = [
        (MODELS[index % 4], [draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 70))])
        for index in range(6)
    ]
    quiet = loaded(world, dtype=dtype)
    alone = [answers(quiet, [each])[0] for each in requests]
    assert answers(quiet, requests) == alone
    chunked = loaded(world, dtype=dtype, max_batch_tokens=24, prefix_cache=True)
    assert answers(chunked, requests) == alone
    assert answers(chunked, requests) == alone
    model = chunked.base.model
    size, config = model.dtype.itemsize, model.config
    # states are kept of fewer places than keys and values
    assert chunked.engine.stats.prefix_tokens_hit > (0 if config.state_bytes(size) else 100)
    token_bytes = size * sum(layer.mixer.cached_features for layer in config.layers)
    cache = 208 * token_bytes + SEQS * config.state_bytes(size)
    timeless = engine_without_time()  # how much a step has of prompts would depend on the machine
    scarce = loaded(world, dtype=dtype, kv_memory_gb=cache / 1e9, max_batch_seqs=SEQS, build=timeless)
    assert answers(scarce, requests * 2) == alone * 2
    assert scarce.engine.stats.preemptions > 0


@of_families("llama", "gemma2", "qwen3_5")
def test_scores_of_a_prompt_are_the_same_in_chunks_and_in_a_batch(world: tuple[World, MemoryStore]) -> None:
    """prompt_logprobs of every token, beside others and alone."""
    draw = random.Random(6)
    requests = [(MODELS[index % 4], [draw.randrange(3, VOCAB) for _ in range(90)]) for index in range(3)]
    quiet = loaded(world, dtype="bfloat16")
    alone = [answers(quiet, [each], prompt_logprobs=2)[0] for each in requests]
    assert len(alone[0]) == 90 + NEW
    assert answers(loaded(world, dtype="bfloat16", max_batch_tokens=40), requests, prompt_logprobs=2) == alone


class Moody:
    """A product whose sums differ for one row, and where a row stands at an odd place of 64."""

    def __init__(self, moods: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weight = torch.randn(40, 24, generator=generator)
        self._moods = moods
        self.seen: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Return [T, 40], the same for every row but for its moods."""
        self.seen.append(len(x))
        out = (x[:, None] * self._weight).sum(-1)
        if len(x) == 1 and "one" in self._moods:
            out += 1e-3
        if len(x) == 64 and "place" in self._moods:
            out[1::2] += 1e-3
        return torch.rand_like(out) if "never" in self._moods else out


def test_products_are_of_sizes_that_agree() -> None:
    """A product whose sums depend on size or place is left out; the rest serves any number of rows."""
    assert agreeing_sizes(Moody(""), 24, 40, torch.float32) == ROWS
    moody = Moody("one place")
    sizes = agreeing_sizes(moody, 24, 40, torch.float32)
    assert sizes == tuple(size for size in ROWS if size not in (64, 1))
    x = torch.randn(171, 24)
    moody.seen.clear()
    whole = in_pieces(moody, x, sizes)
    assert moody.seen == [192]
    moody.seen.clear()
    assert torch.equal(in_pieces(moody, x[:139], sizes), whole[:139])
    assert moody.seen == [128, 11]
    for rows in (1, 2, 3, 64):
        assert torch.equal(in_pieces(moody, x[5 : 5 + rows], sizes), whole[5 : 5 + rows])


def test_a_machine_on_which_no_size_agrees_is_reported() -> None:
    """The start is refused rather than a promise broken."""
    with pytest.raises(SettingsInvalid, match="24 x 40 depend on a row"):
        agreeing_sizes(Moody("never the same"), 24, 40, torch.float32)


@of_families("llama")
@pytest.mark.parametrize("settings", [{"native": False}, {"backend": "torch"}, {"dtype": "float16"}], ids=str)
def test_what_cannot_keep_the_promise_is_refused_by_name(
    world: tuple[World, MemoryStore], settings: dict[str, Any]
) -> None:
    """Plain torch and the GPU's kernels sum in an order that depends on the step."""
    with pytest.raises(SettingsInvalid, match="LORAMUX_DETERMINISTIC=true needs a CPU and compiled operations"):
        loaded(world, **settings)
