"""The reader of a base's ``quantization_config``, as the hub has them, and its refusals."""

from typing import Any

import pytest

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.formats import Quantization, WeightScheme
from loramux_shared.bases.memory import widening
from loramux_shared.bases.read import read_fields
from loramux_shared.faults import CheckpointInvalid
from tests.support.adapters import BASE_CONFIG
from tests.support.cases import cases

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": INT4 | {"dynamic": False}, "input_activations": None}
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "sparsity_config": {},
}
MIXED = COMPRESSED | {
    "format": "mixed-precision",
    "config_groups": {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": INT4, "format": "pack-quantized"},
        "group_1": {
            "targets": ["re:.*self_attn.*"],
            "weights": FP8,
            "input_activations": {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"},
            "format": "float-quantized",
        },
    },
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
NF4 = cases(__file__, "NF4")
GROUPS_OF_128 = WeightScheme("int4", 1, 128)
WITH_ZEROS = WeightScheme("int4", 1, 128, zero_points=True)
PER_TENSOR, PER_ROW = WeightScheme("fp8"), WeightScheme("fp8", rows=1)
READ: dict[str, tuple[dict[str, Any], Quantization]] = {
    "Qwen3 FP8": (
        {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        Quantization("fp8", (WeightScheme("fp8", 128, 128), PER_TENSOR, PER_ROW), rounds_activations=True),
    ),
    "Ministral 3": (
        {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None},
        Quantization("fp8", (PER_TENSOR, PER_ROW), rounds_activations=True),
    ),
    "Llama 3.1 FP8": (
        {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"], "quant_method": "fbgemm_fp8"},
        Quantization("fp8", (PER_ROW,), rounds_activations=True),
    ),
    "W4A16": (COMPRESSED, Quantization("compressed-tensors", (GROUPS_OF_128,))),
    "groups": (MIXED, Quantization("compressed-tensors", (GROUPS_OF_128, PER_ROW), rounds_activations=True)),
    "GPTQ": (GPTQ, Quantization("gptq", (WITH_ZEROS,), columns_are_ordered=True, zeros_less_one=True)),
    "gptqmodel": (
        GPTQ
        | {
            "desc_act": False,
            "checkpoint_format": "gptq_v2",
            "dynamic": {"+:.*down.*": {"bits": 8}, "-:x": {}},
        },
        Quantization("gptq", (WITH_ZEROS, WeightScheme("int8", 1, 128, zero_points=True))),
    ),
    "AWQ": (
        {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "GEMM", "zero_point": True},
        Quantization("awq", (WITH_ZEROS,)),
    ),
    "nf4": (NF4, Quantization("bitsandbytes", (WeightScheme("nf4"),))),
    "int8": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0},
        Quantization("bitsandbytes", (WeightScheme("int8", rows=1),), rounds_activations=True),
    ),
    "gpt-oss": (
        {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
        Quantization("mxfp4", (WeightScheme("mxfp4", 1, 32),)),
    ),
}


def read(config: Any) -> ModelConfig:
    return read_fields(BASE_CONFIG | {"quantization_config": config})


@pytest.mark.parametrize("name", READ)
def test_what_a_config_says_is_read(name: str) -> None:
    config, expected = READ[name]
    assert read(config).quantization == expected


def test_the_old_name_of_compressed_tensors_is_read_too() -> None:
    found = read_fields(BASE_CONFIG | {"compression_config": COMPRESSED})
    assert found.quantization == READ["W4A16"][1]


def _group(**change: Any) -> dict[str, Any]:
    group = COMPRESSED["config_groups"]["group_0"]
    weights = group["weights"] | {key: change[key] for key in change.keys() & (INT4.keys() | {"dynamic"})}
    rest = {key: value for key, value in change.items() if key not in weights}
    return COMPRESSED | {"config_groups": {"group_0": group | rest | {"weights": weights}}}


@pytest.mark.parametrize(("config", "expected"), cases(__file__, "test_what_is_not_read_is_refused_by_name"))
def test_what_is_not_read_is_refused_by_name(config: Any, expected: str) -> None:
    with pytest.raises(CheckpointInvalid, match=expected):
        read(config)


def test_what_widening_takes_is_told() -> None:
    """Reports the bytes of the files where they are known; a base that is served as stored has no report."""
    model = read(GPTQ)
    reported = widening(model, 1_234_567_890, "bfloat16")
    assert reported.startswith("widened from gptq (int4) at load: 1.2 GB in the files, ")
    assert "in the files" not in widening(model, None, "float32")
    assert widening(read_fields(BASE_CONFIG), 10**9, "bfloat16") == ""
