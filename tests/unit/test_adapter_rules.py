from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from builder_service.domain.adapter_config import AdapterConfig, parse_config
from builder_service.domain.file_rules import file_findings
from builder_service.domain.rules import CheckedAdapter, Rulebook, base_warning, check_adapter
from builder_service.domain.safetensors_header import HeaderInvalid, read_header
from builder_service.domain.tensor_names import LoraKey, RefusedKey, parse_key
from builder_service.domain.tensor_rules import Limits
from shared.bundle.modules import BaseDims
from shared.deployment import Dtype
from tests.adapters import BASE_CONFIG, key, tensors, write_adapter

ROOT = "base_model.model.model."


def book(
    dtype: Dtype = Dtype.BFLOAT16, max_rank: int = 64, modules: tuple[str, ...] = (), **config: Any
) -> Rulebook:
    """Rules of a deployment of the small base."""
    limits = Limits(BaseDims.from_config(BASE_CONFIG | config), max_rank, frozenset(modules))
    return Rulebook(limits, ("LlamaForCausalLM",), dtype)


def codes(checked: CheckedAdapter) -> list[str]:
    """The codes that were found, in order."""
    return [finding.code for finding in checked.findings]


def test_a_good_adapter_has_no_findings(tmp_path):
    """A plain adapter passes, and its rows are sorted by layer and module id."""
    checked = check_adapter(write_adapter(tmp_path), book())
    assert checked.findings == ()
    places = [
        (planned.row.layer, planned.row.module, planned.row.rank, planned.row.scale) for planned in checked.rows
    ]
    assert places == [
        (0, "attn_q", 4, 2.0),
        (0, "attn_v", 4, 2.0),
        (1, "attn_q", 4, 2.0),
        (1, "attn_v", 4, 2.0),
    ]


CONFIG_CASES: list[tuple[str, dict[str, Any]]] = [
    ("E_BAD_CONFIG", {"r": 0}),
    ("E_BAD_CONFIG", {"r": True}),
    ("E_BAD_CONFIG", {"lora_alpha": -1}),
    ("E_BAD_CONFIG", {"lora_alpha": "16"}),
    ("E_BAD_CONFIG", {"rank_pattern": {"q_proj": 0}}),
    ("E_BAD_CONFIG", {"alpha_pattern": {"(": 8}}),
    ("E_NOT_LORA", {"peft_type": "IA3"}),
    ("E_MLX", {"fine_tune_type": "lora"}),
    ("E_DORA", {"use_dora": True}),
    ("E_BIAS", {"bias": "all"}),
    ("E_BIAS", {"lora_bias": True}),
    ("E_VARIANT", {"use_qalora": True}),
    ("E_VARIANT", {"kasa_config": {"beta": 1}}),
    ("E_INIT", {"init_lora_weights": "pissa_niter_4"}),
    ("E_INIT", {"init_lora_weights": "loftq"}),
    ("E_ALORA", {"alora_invocation_tokens": [1, 2]}),
    ("E_REPLICATION", {"layer_replication": [[0, 2]]}),
    ("E_TARGET_PARAMS", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    ("E_TASK", {"task_type": "SEQ_CLS"}),
    ("E_EMBED", {"modules_to_save": ["lm_head"]}),
    ("E_EMBED", {"trainable_token_indices": [5]}),
    ("E_BASE", {"auto_mapping": {"base_model_class": "MistralForCausalLM"}}),
    ("E_RANK_SHAPE", {"r": 8}),
]


@pytest.mark.parametrize(
    ("code", "config"), CONFIG_CASES, ids=[f"{c}-{next(iter(f))}" for c, f in CONFIG_CASES]
)
def test_config_rules(tmp_path, code, config):
    """What a config asks for and cannot be served is refused by name, once."""
    assert codes(check_adapter(write_adapter(tmp_path, **config), book())) == [code]


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False},
        {"task_type": None},
        {"velora_config": {"x": 1}},
        {"megatron_core": "megatron.core", "fan_in_fan_out": True, "lora_dropout": 0.1},
        {"an_unknown_key": False},
        {"auto_mapping": {"base_model_class": "LlamaModel"}},
        {"target_modules": ".*q_proj|.*v_proj"},
        {"lora_alpha": None},
    ],
    ids=lambda config: next(iter(config)),
)
def test_configs_that_are_fine(tmp_path, config):
    """Fields without effect on the served weights do not matter."""
    assert codes(check_adapter(write_adapter(tmp_path, **config), book())) == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"lora_alpha": NaN, "peft_type": "LORA"}', "[" * 100_000])
def test_config_that_is_no_json_object(text):
    """A config that is no JSON object is one finding."""
    assert [finding.code for finding in parse_config(text.encode()).findings] == ["E_BAD_CONFIG"]


def without(name: str) -> dict[str, Any]:
    """Good tensors but one."""
    return {k: v for k, v in tensors().items() if k != name}


def with_key(name: str, shape: tuple[int, ...] = (4, 16)) -> dict[str, Any]:
    """Good tensors and one more."""
    return {**tensors(), name: np.ones(shape, np.float16)}


def with_value(value: float, dtype: Any = np.float32) -> dict[str, Any]:
    """Good tensors with one value changed."""
    made: dict[str, Any] = {k: v.astype(dtype) for k, v in tensors().items()}
    made[key(0, "q_proj", "A")][1, 2] = value
    return made


EXPERT = f"{ROOT}layers.0.mlp.experts.0.up_proj.lora_A.weight"
TENSOR_CASES: list[tuple[str, dict[str, Any]]] = [
    ("E_EMPTY_WEIGHTS", {}),
    ("E_EMPTY_WEIGHTS", with_key(key(0, "o_proj", "A"), (0, 16))
        | {key(0, "o_proj", "B"): np.ones((16, 0), "f4")}),
    ("E_UNKNOWN_KEY", with_key("something.else")),
    ("E_UNKNOWN_KEY", with_key("model.layers.0.self_attn.q_proj.lora_A.weight")),
    ("E_ADAPTER_INFIX", with_key(key(1, "o_proj", "A").replace("_A", "_A.default"))
        | {key(1, "o_proj", "B"): np.ones((16, 4), "f4")}),
    ("E_PREFIX", with_key("base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight")),
    ("E_MODULE", with_key(f"{ROOT}layers.0.self_attn.qkv_proj.lora_A.weight")),
    ("E_MODULE", with_key(f"{ROOT}layers.0.mlp.q_proj.lora_A.weight")),
    ("E_PAIR", without(key(1, "v_proj", "B"))),
    ("E_PAIR", with_key(key(0, "q_proj", "A", "base_model.model.language_model.model."))),
    ("E_RANK_SHAPE", tensors() | {key(0, "q_proj", "A"): np.ones((8, 16), "f4")}),
    ("E_RANK_SHAPE", tensors() | {key(0, "q_proj", "A"): np.ones((4, 16, 1, 1), "f4")}),
    ("E_DIMS", tensors() | {key(0, "q_proj", "A"): np.ones((4, 20), "f4")}),
    ("E_LAYER", tensors(layers=3)),
    ("E_RANK_MAX", tensors(rank=8)),
    ("E_EMBED", with_key(f"{ROOT}embed_tokens.lora_embedding_A")),
    ("E_EMBED", with_key("base_model.model.lm_head.weight")),
    ("E_DORA", with_key(f"{ROOT}layers.0.self_attn.q_proj.lora_magnitude_vector", (16,))),
    ("E_BIAS", with_key(f"{ROOT}layers.0.self_attn.q_proj.lora_B.bias", (16,))),
    ("E_MOE", with_key(EXPERT)),
    ("E_MLX", with_key("model.layers.0.self_attn.q_proj.lora_a")),
    ("E_VARIANT", with_key(f"{ROOT}layers.0.self_attn.q_proj.lora_diag")),
    ("E_NAN", with_value(np.nan, ml_dtypes.bfloat16)),
    ("E_NAN", with_value(np.inf, ml_dtypes.bfloat16)),
    ("E_OVERFLOW", with_value(3.4e38)),
    ("E_DTYPE", tensors() | {key(0, "q_proj", "A"): np.ones((4, 16), "i1")}),
    ("E_DTYPE", tensors() | {key(0, "q_proj", "A"): np.ones((4, 16), "f8")}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "values"), TENSOR_CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(TENSOR_CASES)]
)
def test_tensor_rules(tmp_path, code, values):
    """A tensor that cannot be used is refused by name, once, and never dropped."""
    checked = check_adapter(write_adapter(tmp_path, values, r=None), book(max_rank=4))
    assert [finding.code for finding in checked.errors] == [code]


def test_no_targets_and_no_tensors(tmp_path):
    """An adapter that targets nothing is told apart from one that lost its tensors."""
    assert codes(check_adapter(write_adapter(tmp_path, {}, target_modules=[]), book())) == ["E_EMPTY_TARGETS"]


def test_one_finding_for_all_layers(tmp_path):
    """Wrong dims in every layer are one finding that names the module and both numbers."""
    values = {k: (np.ones((4, 20), "f4") if "q_proj.lora_A" in k else v) for k, v in tensors().items()}
    (finding,) = check_adapter(write_adapter(tmp_path, values), book()).errors
    assert finding.where == "layer 0 q_proj, layer 1 q_proj"
    assert (finding.expected, finding.found) == ("q_proj in=16 out=16", "in=20 out=16")


def test_all_violations_at_once(tmp_path):
    """Config, key, shape and value rules are all reported together."""
    values = with_value(np.nan) | {"x": np.ones(1, "f4"), key(1, "o_proj", "A"): np.ones((4, 16), "f4")}
    checked = check_adapter(write_adapter(tmp_path, values, use_dora=True, r=8), book())
    errors = {finding.code for finding in checked.errors}
    assert errors == {"E_DORA", "E_UNKNOWN_KEY", "E_PAIR", "E_RANK_SHAPE", "E_NAN"}


def test_target_modules_of_the_deployment_are_a_ceiling(tmp_path):
    """An adapter that targets more than the deployment allows is refused, with what to add."""
    (finding,) = check_adapter(write_adapter(tmp_path), book(modules=("attn_q",))).errors
    assert (finding.code, finding.fix) == ("E_MODULE", "Add attn_v to lora_target_modules.")


def test_float16_overflow_names_the_cure(tmp_path):
    """A value that float16 cannot hold is refused with both numbers and the cure."""
    checked = check_adapter(write_adapter(tmp_path, with_value(9.1e4, ml_dtypes.bfloat16)), book(Dtype.FLOAT16))
    (finding,) = checked.errors
    assert finding.code == "E_OVERFLOW"
    assert "6.550e+04 in float16" in finding.expected
    assert "bfloat16" in finding.fix


WARNINGS: list[tuple[str, dict[str, Any], dict[str, Any], Rulebook]] = [
    ("W_FP32", {k: v.astype("f4") for k, v in tensors().items()}, {}, book()),
    ("W_ZERO_B", {k: v if "_A" in k else np.zeros_like(v) for k, v in tensors().items()}, {}, book()),
    ("W_UNDERFLOW", {k: v * ml_dtypes.bfloat16(3e-8) for k, v in tensors().items()}, {}, book(Dtype.FLOAT16)),
    ("W_ALPHA", tensors(), {"lora_alpha": 1024}, book()),
    ("W_RANK", tensors(), {"r": None}, book()),
    ("W_TARGETS", tensors(), {"target_modules": ["q_proj", "v_proj", "gate_proj"]}, book()),
    ("W_ODENSE", tensors(("q_proj",)) | {
        key(0, "o_proj", "A"): np.ones((4, 16), "f2"), key(0, "o_proj", "B"): np.ones((32, 4), "f2"),
    }, {"target_modules": "all-linear"}, book(hidden_size=32, head_dim=4)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "values", "config", "rules"), WARNINGS, ids=[case[0] for case in WARNINGS])
def test_warnings(tmp_path, code, values, config, rules):
    """What is legal and odd is accepted with a warning."""
    if code == "W_ODENSE":
        values = {k: v for k, v in values.items() if "o_proj" in k}
    checked = check_adapter(write_adapter(tmp_path, values, **config), rules)
    assert checked.errors == ()
    assert codes(checked) == [code]


FILES: list[tuple[list[str], list[str]]] = [
    ([], ["E_NO_CONFIG"]),
    (["config.json", "model.safetensors"], ["E_NO_CONFIG"]),
    (["checkpoint-500/adapter_config.json", "README.md"], ["E_NO_CONFIG"]),
    (["adapter_config.json", "adapter_model.bin"], ["E_BIN_ONLY"]),
    (["adapter_config.json", "adapter_model-00001-of-00002.safetensors"], ["E_SHARDED"]),
    (["adapter_config.json", "adapters.safetensors"], ["E_MLX"]),
    (["adapter_config.json"], ["E_NO_WEIGHTS"]),
    (["adapter_model.bin"], ["E_NO_CONFIG", "E_BIN_ONLY"]),
    (["adapter_config.json", "adapter_model.safetensors", "optimizer.pt"], []),
]


@pytest.mark.parametrize(("names", "expected"), FILES, ids=[" ".join(case[1]) or "fine" for case in FILES])
def test_file_rules(names, expected):
    """The files of a folder say what it is, before anything is fetched."""
    assert [finding.code for finding in file_findings(names)] == expected


def test_subfolder_is_suggested():
    """An adapter one folder below is not taken silently, but named."""
    (finding,) = file_findings(["checkpoint-500/adapter_config.json", "README.md"])
    assert finding.fix == "The adapter is in 'checkpoint-500': set subfolder."


@pytest.mark.parametrize(
    ("patterns", "name", "expected"),
    [
        ({"proj": 2}, "model.layers.0.self_attn.q_proj", 8),
        ({"q_proj": 2, r"model\.layers\.0\.self_attn\.q_proj": 3}, "model.layers.0.self_attn.q_proj", 2),
        ({r"^model\.layers\.0\..*": 3}, "model.layers.0.self_attn.q_proj", 3),
        ({r"layers\.1\.self_attn\.q_proj": 3}, "model.layers.11.self_attn.q_proj", 8),
        ({"self_attn.q_proj": 5}, "model.layers.4.self_attn.q_proj", 5),
    ],
)
def test_patterns_match_as_in_peft(patterns, name, expected):
    """The first pattern in the file's order that matches the end of the name decides."""
    assert AdapterConfig(8, 16.0, rank_pattern=patterns).ranks_of(name)[0] == expected


def test_rank_and_alpha_are_matched_independently():
    """The scale has the module's own alpha, and the module's own rank."""
    config = AdapterConfig(8, 16.0, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True)
    assert config.scale_of("model.layers.0.self_attn.q_proj", 4) == 8
    assert config.scale_of("model.layers.0.self_attn.v_proj", 9) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"{ROOT}layers.3.self_attn.q_proj.lora_A.weight",
        "base_model.model.layers.3.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight",
        "base_model.model.language_model.model.layers.3.self_attn.q_proj.lora_A.weight",
        f"_orig_mod.{ROOT}layers.3._fsdp_wrapped_module.self_attn.q_proj.lora_A.default.weight",
        f"module.{ROOT}layers.3.self_attn.q_proj.lora_A.weight",
    ],
)
def test_known_prefixes(text):
    """The prefixes of trainers and wrappers lead to the same module."""
    parsed = parse_key(text)
    assert isinstance(parsed, LoraKey)
    assert (parsed.layer, parsed.leaf, parsed.side) == (3, "q_proj", "A")


@pytest.mark.parametrize(
    "text",
    ["", ".", f"{ROOT}layers.x.self_attn.q_proj.lora_A.weight", f"{ROOT}layers.-1.mlp.up_proj.lora_A.weight"],
)
def test_unknown_keys(text):
    """Nothing is guessed from the last part of a key."""
    assert parse_key(text) == RefusedKey("E_UNKNOWN_KEY", "")


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}
HEADERS = [
    b"",
    b"\x01",
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 100) + b"{}",
    file_of(b"[]"),
    file_of(b"\xff\xfe"),
    file_of(b'{"a":1,"a":1}'),
    file_of(b"[" * 100_000),
    file_of({"a": GOOD}, bytes(3)),
    file_of({"a": GOOD}, bytes(5)),
    file_of({"a": GOOD | {"shape": [3]}}, bytes(4)),
    file_of({"a": GOOD | {"shape": [-2]}}, bytes(4)),
    file_of({"a": GOOD | {"shape": [True]}}, bytes(2)),
    file_of({"a": GOOD | {"dtype": "F17"}}, bytes(4)),
    file_of({"a": GOOD | {"x": 1}}, bytes(4)),
    file_of({"a": GOOD, "b": GOOD}, bytes(4)),
    file_of({"a": GOOD | {"data_offsets": [1, 5]}}, bytes(5)),
    file_of({"a": GOOD, "b": GOOD | {"data_offsets": [5, 9]}}, bytes(9)),
]


@pytest.mark.parametrize("data", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers(tmp_path: Path, data: bytes):
    """A safetensors file that lies about itself is refused, and the adapter with it."""
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(HeaderInvalid):
        read_header(path)
    assert codes(check_adapter(tmp_path, book())) == ["E_BAD_WEIGHTS"]


@pytest.mark.parametrize(
    ("adapter", "base", "warns"),
    [
        ("org/tiny", "org/tiny", False),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B", False),
        ("/root/models/Llama-3.2-1B/", "meta-llama/Llama-3.2-1B", False),
        ("org/other", "org/tiny", True),
        ("", "org/tiny", True),
    ],
)
def test_base_names(adapter, base, warns):
    """Copies of a base under other names are the base; anything else is worth a warning."""
    assert (base_warning(adapter, base) is not None) == warns
