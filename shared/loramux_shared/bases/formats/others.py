"""The formats with one scheme for all linears: FP8, GPTQ, AWQ, bitsandbytes, MXFP4."""

from __future__ import annotations

from typing import Any

from loramux_shared.bases.formats.compressed import block_of
from loramux_shared.bases.formats.scheme import Numbers, Quantization, WeightScheme
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid

FP8_BLOCK = (128, 128)
"""Block size of FP8 where a config names none, as in transformers."""
MXFP4_COLUMNS = 32


def read_fp8(config: HfConfig) -> Quantization:
    """Read DeepSeek's blocks, and scales of a tensor or of a row, as which Mistral and AutoFP8 have them."""
    config.require("activation_scheme", "dynamic", "static")
    config.require("scale_fmt", "float", "ue8m0")
    config.require("expert_dtype", "fp8")
    config.require("kv_cache_scheme", None)
    blocks = config.fields.get("weight_block_size", FP8_BLOCK)
    block = block_of(config, "weight_block_size") if blocks not in (None, FP8_BLOCK) else blocks
    schemes = [WeightScheme("fp8"), WeightScheme("fp8", rows=1)]
    if block is not None:
        schemes.insert(0, WeightScheme("fp8", *block))
    return Quantization("fp8", tuple(schemes), rounds_activations=True)


def read_fbgemm(config: HfConfig) -> Quantization:
    """Read FP8 with a scale for each row."""
    del config
    return Quantization("fp8", (WeightScheme("fp8", rows=1),), rounds_activations=True)


def read_gptq(config: HfConfig) -> Quantization:
    """Read GPTQ, also where ``dynamic`` gives some linears other sizes."""
    config.require("pack_dtype", "int32")
    config.require("is_marlin_format", False)
    key = "checkpoint_format" if config.fields.get("checkpoint_format") else "format"
    config.require(key, "gptq", "gptq_v2")
    dynamic = [rule for rule in config.block("dynamic").fields.values() if isinstance(rule, dict)]
    schemes = [
        _gptq_scheme(HfConfig({**config.fields, **rule}, config.architecture, at=config.at))
        for rule in ({}, *dynamic)
    ]
    return Quantization(
        "gptq",
        tuple(dict.fromkeys(schemes)),
        columns_are_ordered=config.flag("desc_act", default=False),
        zeros_less_one=config.text(key, "gptq") == "gptq",
    )


def _gptq_scheme(config: HfConfig) -> WeightScheme:
    config.require("bits", 4, 8)
    numbers: Numbers = "int8" if config.integer("bits", 4) == 8 else "int4"
    return WeightScheme(numbers, 1, _group_size(config), zero_points=True)


def read_awq(config: HfConfig) -> Quantization:
    """Read AWQ as AutoAWQ packs it for its ``gemm``."""
    config.require("bits", 4)
    config.require("zero_point", True)
    key = "version" if config.fields.get("version") is not None else "format"
    lower: Any = config.text(key, "gemm").lower()
    HfConfig({key: lower}, config.architecture, at=config.at).require(key, "gemm")
    return Quantization("awq", (WeightScheme("int4", 1, _group_size(config), zero_points=True),))


def _group_size(config: HfConfig) -> int | None:
    size = config.integer("group_size", 128)
    if size == 0 or size < -1:
        raise CheckpointInvalid(
            f"config.json: {config.at}group_size: expected a positive integer, or -1 for rows, found {size}."
        )
    return None if size == -1 else size


def read_bitsandbytes(config: HfConfig) -> Quantization:
    """Read nf4 and fp4, whose blocks each weight describes itself, and int8 with a scale for each row."""
    four, eight = (config.flag(f"load_in_{bits}bit", default=False) for bits in (4, 8))
    if four == eight:
        raise CheckpointInvalid(
            f"config.json: {config.at}load_in_4bit and load_in_8bit: expected one of both to be true."
        )
    if eight:
        return Quantization("bitsandbytes", (WeightScheme("int8", rows=1),), rounds_activations=True)
    config.require("bnb_4bit_quant_type", "fp4", "nf4")
    numbers: Numbers = "nf4" if config.text("bnb_4bit_quant_type", "fp4") == "nf4" else "fp4"
    return Quantization("bitsandbytes", (WeightScheme(numbers),))


def read_mxfp4(config: HfConfig) -> Quantization:
    """Read the experts of gpt-oss."""
    del config
    return Quantization("mxfp4", (WeightScheme("mxfp4", 1, MXFP4_COLUMNS),))
