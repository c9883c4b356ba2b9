"""bitsandbytes, of whose weights each describes itself."""

from typing import Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme
from loramux_shared.faults import CheckpointInvalid


def read_bitsandbytes(config: HfConfig) -> Quantization:
    """Read nf4 and fp4, whose blocks each weight describes itself, and int8 with a scale for each row."""
    four, eight = (config.flag(f"load_in_{bits}bit", default=False) for bits in (4, 8))
    if four == eight:
        raise CheckpointInvalid(
            f"config.json: {config.at}load_in_4bit and load_in_8bit: expected one of both to be true."
        )
    if eight:
        return Quantization("bitsandbytes", (WeightScheme("int8", rows=1),))
    config.require("bnb_4bit_quant_type", "fp4", "nf4")
    numbers = "nf4" if config.text("bnb_4bit_quant_type", "fp4") == "nf4" else "fp4"
    return Quantization("bitsandbytes", (WeightScheme(numbers),))


BITSANDBYTES: Final = WeightFormat(
    "bitsandbytes", ("bitsandbytes",), "nf4, fp4, with double quantisation or not; int8", read_bitsandbytes
)
