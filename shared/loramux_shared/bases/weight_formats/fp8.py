"""FP8: numbers of 8 bits of floating point, with scales."""

from typing import Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme, block_of

FP8_BLOCK: Final = (128, 128)
"""Block size of FP8 where a config names none, as in transformers."""


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
    return Quantization("fp8", tuple(schemes))


FBGEMM: Final = Quantization("fp8", (WeightScheme("fp8", rows=1),))


FP8: Final = WeightFormat("fp8", ("fp8",), "e4m3 or e5m2 with scales per block, row or tensor", read_fp8)
FBGEMM_FP8: Final = WeightFormat("fp8", ("fbgemm_fp8",), "e4m3 with scales per row", lambda _: FBGEMM)
