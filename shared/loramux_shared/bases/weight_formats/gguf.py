"""The blocks of a file of GGUF."""

from typing import Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat, WeightScheme


def read_gguf(config: HfConfig) -> Quantization:
    """Read what `gguf.files` writes of a file."""
    sizes, types = config.block("bytes"), config.array("types") or []
    linears, tables = (sizes.integer(key, 0) for key in ("linears", "tables"))
    schemes = (WeightScheme("blocks"),)
    return Quantization("gguf", schemes, types=(*map(str, types),), linear_bytes=linears, table_bytes=tables)


GGUF: Final = WeightFormat("gguf", ("gguf",), "blocks of llama.cpp, of a file of GGUF", read_gguf)
