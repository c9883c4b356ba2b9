"""GPTQ, of which each group of columns has scales and zero points."""

from typing import Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme
from loramux_shared.faults import CheckpointInvalid


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
    numbers = "int8" if config.integer("bits", 4) == 8 else "int4"
    return WeightScheme(numbers, 1, group_size_of(config), zero_points=True)


def group_size_of(config: HfConfig) -> int | None:
    """Return the columns that share a scale, None for all; raise CheckpointInvalid for no such number."""
    size = config.integer("group_size", 128)
    if size == 0 or size < -1:
        raise CheckpointInvalid(
            f"config.json: {config.at}group_size: expected a positive integer, or -1 for rows, found {size}."
        )
    return None if size == -1 else size


GPTQ: Final = WeightFormat(
    "gptq",
    ("gptq",),
    "int4 and int8, both forms of zero points, with or without desc_act; also by `quantize_config.json`",
    read_gptq,
)
