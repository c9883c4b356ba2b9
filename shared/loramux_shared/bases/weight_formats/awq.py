"""AWQ, as AutoAWQ packs it."""

from typing import Any, Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme
from loramux_shared.bases.weight_formats.gptq import group_size_of


def read_awq(config: HfConfig) -> Quantization:
    """Read AWQ as AutoAWQ packs it for its ``gemm``."""
    config.require("bits", 4)
    config.require("zero_point", True)
    key = "version" if config.fields.get("version") is not None else "format"
    lower: Any = config.text(key, "gemm").lower()
    HfConfig({key: lower}, config.architecture, at=config.at).require(key, "gemm")
    return Quantization("awq", (WeightScheme("int4", 1, group_size_of(config), zero_points=True),))


AWQ: Final = WeightFormat("awq", ("awq",), "int4 as AutoAWQ packs it for gemm", read_awq)
