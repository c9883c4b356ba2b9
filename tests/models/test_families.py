"""Every family of decoders against transformers and PEFT, token for token in float32, on tiny random models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeTextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    SmolLM3Config,
)

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.runner import Runner
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.decoder import Decoder
from inference_service.startup.load import Ready
from loramux_shared.bases.memory import count_weights
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.faults import CheckpointInvalid, SettingsInvalid
from loramux_shared.storage.memory import MemoryStore
from tests.models.test_merge import ready_of
from tests.support import tiny
from tests.support.greedy import choices_and_logprobs, greedy_tokens
from tests.support.poisoned import poison
from tests.support.tiny import (
    ADAPTERS,
    SIZES,
    VOCAB,
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
WINDOW = 24
PHI_ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": ["qkv_proj"]},
    "all": {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        "rank_pattern": {"qkv_proj": 12, r"layers\.0\.mlp\.gate_up_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "rs": ADAPTERS["rs"],
}
MOE_ADAPTERS: dict[str, dict[str, Any]] = {
    "wide": ADAPTERS["wide"],
    "all": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {r"1\.mlp\.experts\.gate_up_proj": 5, "q_proj": 12},
        "alpha_pattern": {"mlp.experts.down_proj": 3},
    },
    "rs": {
        "r": 2,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": [],
        "target_parameters": ["experts.down_proj"],
    },
}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GEMMA = {"head_dim": 16, "num_hidden_layers": 3, "tie_word_embeddings": True, "sliding_window": WINDOW}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MINISTRAL = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 8.0,
        "original_max_position_embeddings": 20,
        "llama_4_scaling_beta": 0.5,
    },
    "pad_token_id": 0,
}
PIXTRAL = {"model_type": "pixtral", **VISION, "head_dim": 8}
OF_TEXT = {"all": ADAPTERS["all"] | {"target_modules": r".*language_model.*\.(q_proj|o_proj|down_proj)"}}
GEMMA_4 = {"head_dim": 16, "global_head_dim": 32, "sliding_window": WINDOW, "tie_word_embeddings": True}
OF_INPUTS = {
    "inputs": {
        "r": 3,
        "lora_alpha": 9,
        "target_modules": ["per_layer_input_gate", "per_layer_projection", "k_proj"],
    }
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "wide": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 12}},
    "all": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ATTENTION,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "rs": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj"],
    },
}
BESIDE: dict[str, dict[str, Any]] = {
    "all": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": r".*language_model.*\.(q_proj|k_proj|o_proj|gate_proj|down_proj)",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"down_proj": 5},
    }
}
"""Adapters of an MLP and of the experts beside it."""
FACTORS = [1.0 + 0.1 * index for index in range(4)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": FACTORS[:3],
    "long_factor": [4 * factor for factor in FACTORS[:3]],
    "partial_rotary_factor": 0.75,
}


QWEN_DELTA = {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e3,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "pad_token_id": 0,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 48, "mlp_ratio": 1, "num_heads": 2}
DELTA_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}


def delta_adapters(where: str = "") -> dict[str, dict[str, Any]]:
    """Adapters of all that Qwen 3.5 has, of modules whose names begin with a pattern."""
    every = "in_proj_(qkv|z|b|a)|out_proj|[qkvo]_proj|(gate|up|down)_proj"
    return {
        "wide": {"r": 8, "lora_alpha": 16, "target_modules": rf"{where}.*\.(in_proj_qkv|q_proj|out_proj)"},
        "all": {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": rf"{where}.*\.({every})",
            "rank_pattern": {"in_proj_z": 12, r"layers\.0\.linear_attn\.in_proj_b": 2},
            "alpha_pattern": {"in_proj_a": 3},
        },
        "rs": {
            "r": 5,
            "lora_alpha": 7,
            "use_rslora": True,
            "target_modules": rf"{where}.*\.(in_proj_a|down_proj)",
        },
    }


ALL = {"all": ADAPTERS["all"]}
"""For what a family does otherwise with its positions, windows or biases alone."""


@dataclass(frozen=True)
class Case:
    """A checkpoint of a family."""

    config: PreTrainedConfig
    adapters: Mapping[str, Mapping[str, Any]]
    max_seq_len: int | None = None
    shortest: int = 1
    """Tokens of the shortest prompt."""
    stepwise: bool = False
    """True if keys are rotated otherwise as the sequence grows, so that only steps of transformers answer."""


def _llama(*, stepwise: bool = False, config: Mapping[str, Any] = MappingProxyType({}), **rope: Any) -> Case:
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 32} | rope
    return Case(LlamaConfig(**SIZES | config, rope_parameters=rope), ALL, stepwise=stepwise)


CASES = {
    "llama-linear": _llama(
        config={"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        rope_type="linear",
        factor=2.0,
    ),
    "llama-3": _llama(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0
    ),
    "llama-dynamic": _llama(rope_type="dynamic", factor=2.0, stepwise=True),
    "llama-yarn": _llama(rope_type="yarn", factor=8.0),
    "llama-yarn-mscale": _llama(
        rope_type="yarn", factor=4.0, mscale=0.8, mscale_all_dim=0.4, beta_fast=16, truncate=False
    ),
    "mistral": Case(MistralConfig(**SIZES, sliding_window=WINDOW), ADAPTERS),
    "mistral-full": Case(MistralConfig(**SIZES, sliding_window=None, head_dim=16), ALL),
    "mixtral": Case(
        MixtralConfig(
            **SIZES | {"intermediate_size": 20},
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
        ),
        MOE_ADAPTERS,
    ),
    "qwen2-vl": Case(Qwen2VLConfig(text_config=SIZES | MROPE, vision_config=QWEN_VISION), OF_TEXT),
    "qwen2.5-vl": Case(
        Qwen2_5_VLConfig(
            text_config=SIZES
            | MROPE
            | {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1}
            | {"sliding_window": WINDOW},
            vision_config=DELTA_VISION | {"fullatt_block_indexes": [0]},
            tie_word_embeddings=True,
        ),
        OF_TEXT,
    ),
    "qwen3-vl": Case(
        Qwen3VLConfig(
            text_config=SIZES | MROPE | {"head_dim": 16, "attention_bias": True},
            vision_config=DELTA_VISION | {"deepstack_visual_indexes": [0]},
        ),
        OF_TEXT,
    ),
    "qwen2": Case(Qwen2Config(**SIZES), ADAPTERS),
    "qwen2-windows": Case(
        Qwen2Config(
            **SIZES | {"num_hidden_layers": 3, "tie_word_embeddings": True},
            use_sliding_window=True,
            sliding_window=WINDOW,
            max_window_layers=1,
        ),
        ALL,
    ),
    "qwen3": Case(Qwen3Config(**SIZES, head_dim=16, attention_bias=True), ADAPTERS),
    "qwen3-moe": Case(Qwen3MoeConfig(**SIZES | EXPERTS, head_dim=16, norm_topk_prob=True), MOE_ADAPTERS),
    "qwen3-moe-dense": Case(
        Qwen3MoeConfig(
            **SIZES | EXPERTS | {"num_hidden_layers": 4},
            attention_bias=True,
            decoder_sparse_step=2,
            mlp_only_layers=[3],
            use_sliding_window=True,
            sliding_window=WINDOW,
        ),
        ALL,
    ),
    "gemma": Case(
        GemmaConfig(**SIZES | {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1}), ADAPTERS
    ),
    "gemma2": Case(
        Gemma2Config(
            **SIZES | GEMMA, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=1.0
        ),
        ADAPTERS,
    ),
    "gemma3": Case(
        Gemma3TextConfig(
            **SIZES | GEMMA,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        ADAPTERS,
    ),
    "gemma3-images": Case(
        Gemma3Config(
            text_config=SIZES | GEMMA | {"layer_types": ["full_attention", *["sliding_attention"] * 2]},
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=VOCAB - 1,
            eos_token_id=2,
        ),
        OF_TEXT,
    ),
    "gemma4-small": Case(
        Gemma4TextConfig(
            **SIZES
            | GEMMA_4
            | {"num_hidden_layers": 4, "use_double_wide_mlp": True, "num_kv_shared_layers": 2},
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
            final_logit_softcapping=1.0,
            attention_bias=True,
        ),
        ADAPTERS | OF_INPUTS,
    ),
    "gemma4-images": Case(
        Gemma4Config(
            text_config=SIZES
            | GEMMA_4
            | {
                "layer_types": ["sliding_attention", "full_attention"],
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 3,
                "hidden_size_per_layer_input": 0,
                "use_bidirectional_attention": "vision",
                "enable_moe_block": True,
                "num_experts": 8,
                "top_k_experts": 3,
                "moe_intermediate_size": 20,
            },
            vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 1},
            eos_token_id=2,
        ),
        BESIDE,
    ),
    "phi3": Case(Phi3Config(**SIZES, sliding_window=WINDOW, pad_token_id=0), PHI_ADAPTERS),
    "phi4-mini": Case(
        Phi3Config(
            **SIZES | {"tie_word_embeddings": True},
            original_max_position_embeddings=96,
            rope_parameters=LONGROPE,
            pad_token_id=0,
        ),
        PHI_ADAPTERS,
    ),
    "phi3-long": Case(
        Phi3Config(**SIZES, original_max_position_embeddings=20, rope_parameters=LONGROPE, pad_token_id=0),
        PHI_ADAPTERS,
        max_seq_len=128,
        shortest=21,
    ),
    "granite": Case(
        GraniteConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
            logits_scaling=5.0,
        ),
        ADAPTERS,
    ),
    "smollm3": Case(
        SmolLM3Config(
            **SIZES | {"num_hidden_layers": 3},
            no_rope_layers=[1, 0, 1],
            sliding_window=WINDOW,
            mlp_bias=True,
            pad_token_id=0,
        ),
        ADAPTERS,
    ),
    "smollm3-windows": Case(
        SmolLM3Config(
            **SIZES | {"tie_word_embeddings": True},
            no_rope_layer_interval=2,
            use_sliding_window=True,
            sliding_window=WINDOW,
            attention_bias=True,
            pad_token_id=0,
        ),
        ALL,
    ),
    "olmo3": Case(
        Olmo3Config(
            **SIZES | {"num_hidden_layers": 4},
            sliding_window=WINDOW,
            attention_bias=True,
            rope_parameters={
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            pad_token_id=0,
        ),
        ADAPTERS,
    ),
    "ministral3": Case(Ministral3Config(**SIZES | MINISTRAL, sliding_window=WINDOW), ADAPTERS),
    "ministral3-images": Case(
        Mistral3Config(
            text_config=SIZES | MINISTRAL | {"model_type": "ministral3"},
            vision_config=PIXTRAL,
            image_token_index=VOCAB - 1,
            tie_word_embeddings=False,
        ),
        OF_TEXT,
    ),
    "mistral3-images": Case(
        Mistral3Config(
            text_config=SIZES | {"model_type": "mistral", "sliding_window": None},
            vision_config=PIXTRAL,
            image_token_index=VOCAB - 1,
        ),
        OF_TEXT,
    ),
    "gpt-oss": Case(
        GptOssConfig(
            **SIZES,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            swiglu_alpha=1.3,
            swiglu_limit=1.5,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            },
            pad_token_id=0,
        ),
        OF_EXPERTS,
    ),
    "qwen3_5-images": Case(
        Qwen3_5Config(
            text_config=SIZES | QWEN_DELTA | {"attention_bias": True, "pad_token_id": 0},
            vision_config=DELTA_VISION,
            tie_word_embeddings=False,
        ),
        delta_adapters(r".*language_model"),
    ),
    "qwen3_5-moe": Case(
        Qwen3_5MoeTextConfig(
            **SIZES | QWEN_DELTA | EXPERTS,
            shared_expert_intermediate_size=28,
            pad_token_id=0,
        ),
        {
            "wide": delta_adapters()["wide"],
            "all": MOE_ADAPTERS["all"]
            | {"target_modules": r".*(q_proj|in_proj_z|shared_expert.*_proj|shared_expert_gate)"},
            "rs": MOE_ADAPTERS["rs"],
        },
    ),
    "olmo2": Case(Olmo2Config(**SIZES, attention_bias=True, pad_token_id=0), ADAPTERS),
}


def _swept_but(*names: str) -> list[Any]:
    """All cases; only those of these names are tried without a sweep."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.sweep) for name in CASES]


def _is_dense(case: Case) -> bool:
    text = case.config.get_text_config()
    return not (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None))


NO_PROOFS = pytest.mark.skip(reason="of mixtures there are no proofs")
DENSE = [name if _is_dense(case) else pytest.param(name, marks=NO_PROOFS) for name, case in CASES.items()]
KERNELS = _swept_but("gemma4-small", "olmo2", "ministral3", "gpt-oss")
"""The others have ropes, windows and norms that kernels see in these too."""
CACHES = _swept_but(
    "llama-dynamic", "mistral", "qwen2-windows", "gemma4-small", "gemma4-images", "phi3-long", "gpt-oss",
    "qwen3_5-images",
)  # fmt: skip
"""One case of those whose caches keep the same of a token."""
HALVES = _swept_but(
    "qwen2", "gemma2", "gemma4-small", "gemma4-images", "phi4-mini", "granite", "olmo2", "gpt-oss",
    "qwen3_5-moe",
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
    adapted: Any
    """Transformers with the adapter "all"."""


@pytest.fixture(scope="module", params=CASES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    case = CASES[request.param]
    world = make_world_of(
        tmp_path_factory.mktemp("family"), case.config, case.adapters, max_seq_len=case.max_seq_len
    )
    store = MemoryStore()
    world.build(store)
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
    return Answers(world, store, requests, expected, found, found_logprobs, logprobs, oracles.get("all"))


def test_a_mixed_batch_equals_transformers(answers: Answers) -> None:
    """Base and adapters in one batch, prompts whole or in chunks, past blocks and windows, with NaN in all of
    the cache that no row sees; and log probabilities, which see what greedy tokens cannot, a cap on the logits
    for one."""
    assert answers.found == answers.expected
    assert answers.found_logprobs == pytest.approx(answers.logprobs, abs=2e-4)
    ready = answers.world.load(answers.store, max_batch_tokens=16)
    poison(ready)
    assert run_engine(ready, answers.requests, NEW) == answers.expected


ONE_RANK = {
    "gemma4-small": "inputs from tokens",
    "gemma4-images": "an MLP beside experts",
    "olmo2": "norms of queries and keys",
    "olmo3": "norms of queries and keys",
    "qwen3_5-images": "a gated delta rule",
    "qwen3_5-moe": "a gated delta rule",
}
"""Cases that ranks cannot divide, and why."""


def test_two_ranks_answer_the_same(answers: Answers, request: pytest.FixtureRequest) -> None:
    """Two ranks that each have some heads, columns and rows of adapters give the tokens of one, prompts in
    chunks; a base that they cannot divide is refused by the name of what they cannot."""
    divided = pytest.importorskip("tests.support.ranks").divided
    ready = answers.world.load(answers.store, max_batch_tokens=16)
    refused = ONE_RANK.get(request.node.callspec.params["answers"])
    expected = nullcontext() if refused is None else pytest.raises(SettingsInvalid, match=refused)
    with expected, divided(ready, answers.world.base, answers.store):
        assert run_engine(ready, answers.requests, NEW) == answers.expected


@pytest.mark.parametrize("answers", KERNELS, indirect=True)
def test_the_kernels_for_gpus_answer_the_same(answers: Answers) -> None:
    """Kernels in the interpreter answer the same: base and adapters, prompts in chunks beside decoding, past
    blocks and windows, in a cache that holds NaN beside what they see.
    """
    ready = answers.world.load(answers.store, backend="triton", max_batch_tokens=32)
    poison(ready)
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
    ready = answers.world.load(answers.store, **tight(answers.world, len(answers.requests)))
    windows = read_config(answers.world.base).windows
    if len(windows) > 1:  # for which a plan has more tokens of everything in as many bytes
        _divide_evenly(ready, (152 if None in windows else 64) // 8)
    poison(ready)
    assert run_engine(ready, answers.requests, NEW) == answers.expected
    assert ready.engine.stats.preemptions > 0
    for _ in range(2):  # alone, so that nobody needs its blocks meanwhile
        assert run_engine(ready, answers.requests[:1], NEW) == answers.expected[:1]
    assert ready.engine.stats.prefix_tokens_hit > 0


def _divide_evenly(ready: Ready, blocks: int) -> None:
    """Give as many blocks to each group of layers."""
    engine = ready.engine._engine
    eager: Any = engine._runner
    runner, limits = (
        Runner(eager._model, eager._lora, blocks, 8),
        replace(engine._limits, max_seq_len=8 * blocks),
    )
    manager = BlockManager(blocks, 8, eager._model.config.windows)
    ready.engine._engine = Engine(runner, limits, manager, engine._residency)


@pytest.mark.parametrize("answers", HALVES, indirect=True)
def test_bfloat16_stays_close(answers: Answers) -> None:
    """Answers stay close in the type of most checkpoints, norms with an offset and caps included."""
    ready = answers.world.load(answers.store, dtype="bfloat16")
    poison(ready)
    found = _engine_logprobs(ready, answers.requests[0][1], new=1)
    assert found == pytest.approx(answers.logprobs[:1], abs=0.5)


@pytest.mark.parametrize("answers", HALVES, indirect=True)
def test_a_cache_of_8_bits_stays_close(answers: Answers) -> None:
    """The scales are read with windows, sinks, caps, keys of other layers and experts.

    Rounding alone changes these random models by up to 0.14; scales of another head or token by up to 1.9.
    """
    ready = answers.world.load(answers.store, backend="torch", device="cpu", kv_cache_dtype="int8")
    poison(ready)
    found = _engine_logprobs(ready, answers.requests[0][1], new=1)
    assert found == pytest.approx(answers.logprobs[:1], abs=0.2)


@pytest.mark.parametrize(("dtype", "max_shard_size"), [("bfloat16", "40KB"), ("float16", "1GB")])
def test_other_types_and_shards_give_the_same_tokens(tmp_path: Path, dtype: str, max_shard_size: str) -> None:
    """Weights in half precision are widened without loss, and found in whichever file they are."""
    case = CASES["qwen2"]
    make_checkpoint(tmp_path / "base", case.config, getattr(torch, dtype), max_shard_size)
    assert (tmp_path / "base" / "model.safetensors").exists() == (max_shard_size == "1GB")
    world, store = World(tmp_path / "base", {}, tmp_path), MemoryStore()
    world.build(store)
    prompt = list(range(3, 40))
    expected = oracle_tokens(oracle(world.base, None), prompt, NEW)
    assert run_engine(world.load(store), [("base", prompt)], NEW) == [expected]


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


@pytest.mark.parametrize("answers", _swept_but("qwen3_5-images"), indirect=True)
def test_a_merged_adapter_equals_transformers(answers: Answers) -> None:
    """Merged weights answer as the adapter does: also all slices of what a delta rule reads, and queries with
    their gates.
    """
    pairs = zip(answers.requests, answers.expected, strict=True)
    requests, expected = zip(*(pair for pair in pairs if pair[0][0] == "all"), strict=True)
    ready = ready_of(answers.world, "all", {"serve_base": False})
    assert run_engine(ready, list(requests), NEW) == list(expected)


def _engine_logprobs(ready: Ready, prompt: list[int], new: int = NEW) -> list[float]:
    engine = ready.engine._engine
    engine.add(Sequence("0", list(prompt), SamplingParams(max_tokens=new, logprobs=1)))
    found: list[float] = []
    while not engine.idle:
        found += [output.token.logprob for output in engine.step() if output.token is not None]
    return found
