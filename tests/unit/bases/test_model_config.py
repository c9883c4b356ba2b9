"""Readers of a base's ``config.json`` and of its ``quantization_config``, and their refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import widening
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.bases.shard import Shard
from loramux_shared.bases.weight_format import Quantization, WeightScheme
from loramux_shared.faults import CheckpointInvalid, SettingsInvalid
from tests.support.adapters import BASE_CONFIG
from tests.support.cases import cases
from tests.support.hub_configs import HUB_CONFIGS


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_older_configs_mean_what_transformers_takes_them_for(tmp_path: Path, name: str) -> None:
    """A config without defaults, and the same config as transformers writes it, are the same model."""
    _write_config(tmp_path, **HUB_CONFIGS[name])
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    for max_seq_len in (None, 8192):
        assert read_config(tmp_path, max_seq_len) == read_config(tmp_path / "full", max_seq_len)


QWEN, SMOL, FULL = "Qwen3_5ForCausalLM", "SmolLM3ForCausalLM", ["full_attention"]
LAYERS = [
    ({"layer_types": ["sliding_attention"] * 32}, "layer_types .* not supported for LlamaForCausalLM"),
    ({"architectures": [SMOL], "layer_types": ["sliding_attention"] * 32}, "layer_types"),
    ({"architectures": [QWEN], "layer_types": ["linear_attention"] * 32}, "attends; found 32 of linear"),
    ({"architectures": [QWEN], "layer_types": FULL * 31}, "layer_types: expected 32 .* found 31"),
    ({"architectures": [QWEN], "layer_types": [*FULL * 31, "mamba"]}, "found 32 of full_attention, mamba"),
]


@pytest.mark.parametrize(
    ("change", "expected"), [*cases(__file__, "test_what_is_not_served_is_refused_by_name"), *LAYERS]
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    """An architecture, a switch or a number that is not served is named."""
    unnamed = {"model_type": None} if "architectures" in change else {}
    _write_config(tmp_path, **HUB_CONFIGS["Llama-3.1"] | {"rope_scaling": None} | unnamed | change)
    with pytest.raises(CheckpointInvalid, match=expected):
        read_config(tmp_path)


def test_ranks_beside_each_other_share_a_head_of_keys() -> None:
    """Ranks 0 and 1 of 4 have the first of 2 heads of keys, which their heads of values share."""
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    dims = {"linear_key_head_dim": 1, "linear_value_head_dim": 1}
    whole = read_fields(HUB_CONFIGS["Qwen3.5-text"] | sizes | dims)
    shared = next(group for group in whole.groups if "delta_qkv" in group.modules)
    parts = [Shard(whole, rank, 4, whole.shard(4)).part(shared) for rank in range(4)]
    assert [part.outputs[0] for part in parts] == [[0, 2, 4], [0, 2, 5], [1, 3, 6], [1, 3, 7]]
    with pytest.raises(SettingsInvalid, match="4 heads of values of a delta rule, which it does not divide"):
        whole.shard(8)


def _write_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


REFUSED: list[tuple[str, dict[str, Any]]] = cases(__file__, "REFUSED")


@pytest.mark.parametrize(("word", "config"), REFUSED, ids=[next(iter(case[1])) for case in REFUSED])
def test_other_geometries_are_refused_by_name(word, config):
    """A base with experts, latent attention, recurrent or uneven layers is named, with the key that tells."""
    with pytest.raises(CheckpointInvalid, match=f"config.json: {next(iter(config))}.*{word}"):
        read_fields(BASE_CONFIG | config)


@pytest.mark.parametrize("config", cases(__file__, "test_words_that_say_nothing"))
def test_words_that_say_nothing(config):
    """Counts of zero, nulls, and the decoder of a model without images have no effect."""
    assert read_fields(BASE_CONFIG | config) == read_fields(BASE_CONFIG)


def test_the_text_decoder_of_a_model_with_images():
    """The sizes of a model with images are those of its text decoder, whatever stands beside it."""
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": BASE_CONFIG,
        "vision_config": {"hidden_size": 9},
        "hidden_size": 99,
    }
    dims = read_fields(config).dims
    assert (dims.hidden, dims.vocab) == (BASE_CONFIG["hidden_size"], BASE_CONFIG["vocab_size"])
    assert dims.head_dim == 256
    with pytest.raises(CheckpointInvalid, match=r"text_config: expected an object, found list"):
        read_fields(config | {"text_config": [1]})


CONFIGS = cases(__file__, "READ")
"""Their `quantization_config`."""
GROUPS_OF_128 = WeightScheme("int4", 1, 128)
WITH_ZEROS = WeightScheme("int4", 1, 128, zero_points=True)
PER_TENSOR, PER_ROW = WeightScheme("fp8"), WeightScheme("fp8", rows=1)
READ: dict[str, Quantization] = {
    "Qwen3 FP8": Quantization("fp8", (WeightScheme("fp8", 128, 128), PER_TENSOR, PER_ROW)),
    "Ministral 3": Quantization("fp8", (PER_TENSOR, PER_ROW)),
    "Llama 3.1 FP8": Quantization("fp8", (PER_ROW,)),
    "W4A16": Quantization("compressed-tensors", (GROUPS_OF_128,)),
    "groups": Quantization("compressed-tensors", (GROUPS_OF_128, PER_ROW)),
    "GPTQ": Quantization("gptq", (WITH_ZEROS,), columns_are_ordered=True, zeros_less_one=True),
    "gptqmodel": Quantization("gptq", (WITH_ZEROS, WeightScheme("int8", 1, 128, zero_points=True))),
    "AWQ": Quantization("awq", (WITH_ZEROS,)),
    "nf4": Quantization("bitsandbytes", (WeightScheme("nf4"),)),
    "int8": Quantization("bitsandbytes", (WeightScheme("int8", rows=1),)),
    "gpt-oss": Quantization("mxfp4", (WeightScheme("mxfp4", 1, 32),)),
}


def read(config: Any) -> ModelConfig:
    return read_fields(BASE_CONFIG | {"quantization_config": config})


@pytest.mark.parametrize("name", READ)
def test_what_a_config_says_is_read(name: str) -> None:
    """Every quantization of the hub is read as its format, its schemes of weights and its order of columns."""
    config, expected = CONFIGS[name], READ[name]
    assert read(config).quantization == expected


def test_the_old_name_of_compressed_tensors_is_read_too() -> None:
    """A `compression_config` is a `quantization_config`."""
    found = read_fields(BASE_CONFIG | {"compression_config": CONFIGS["W4A16"]})
    assert found.quantization == READ["W4A16"]


PACKED = CONFIGS["W4A16"]


def group(**changes: Any) -> dict[str, Any]:
    """Return a config of compressed-tensors whose group has other fields, or other fields of its weights."""
    (old,) = PACKED["config_groups"].values()
    weights = old["weights"] | changes.pop("weights", {})
    return PACKED | {"config_groups": {"group_0": old | {"weights": weights} | changes}}


COMPRESSED = [
    (PACKED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .* is not supported"),
    (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparsity_config\.format .*bitmask"),
    (PACKED | {"transform_config": {"config_groups": {"R1": {}}}}, r"transform_config\.config_groups"),
    (PACKED | {"format": "nvfp4-pack-quantized"}, 'format "nvfp4-pack-quantized" is not supported'),
    (PACKED | {"config_groups": {}}, "config_groups: expected a group, found none"),
    (group(weights={"num_bits": 3}), "int of 3 bits .* pack-quantized; supported: int of 4 bits, int of 8"),
    (group(weights={"dynamic": True}), "weights.dynamic true is not supported"),
    (group(weights={"strategy": "tensor_group"}), 'strategy "tensor_group" is not supported'),
    (group(weights={"group_size": -3}), "group_size: expected a positive integer, found -3"),
    (group(output_activations={"num_bits": 8}), "output_activations .* is not supported"),
]


@pytest.mark.parametrize(
    ("config", "expected"), [*cases(__file__, "test_what_is_not_read_is_refused_by_name"), *COMPRESSED]
)
def test_what_is_not_read_is_refused_by_name(config: Any, expected: str) -> None:
    """A quantization that is not read is refused with the field, its value and what is supported."""
    with pytest.raises(CheckpointInvalid, match=expected):
        read(config)


def test_what_widening_takes_is_reported() -> None:
    """Reports the bytes of the files where they are known; a base that is served as stored has no report."""
    model = read(CONFIGS["GPTQ"])
    reported = widening(model, 1_234_567_890, "bfloat16")
    assert reported.startswith("widened from gptq (int4) at load: 1.2 GB in the files, ")
    assert "in the files" not in widening(model, None, "float32")
    assert widening(read_fields(BASE_CONFIG), 10**9, "bfloat16") == ""
