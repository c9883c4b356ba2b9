"""Checkpoints with weights of 8 or 4 bits: what their ``quantization_config`` says, and which are read."""

from collections.abc import Mapping
from typing import Any, Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.bases.weight_format import Quantization, WeightFormat
from loramux_shared.bases.weight_formats.awq import AWQ
from loramux_shared.bases.weight_formats.bitsandbytes import BITSANDBYTES
from loramux_shared.bases.weight_formats.compressed_tensors import COMPRESSED_TENSORS
from loramux_shared.bases.weight_formats.fp8 import FBGEMM_FP8, FP8
from loramux_shared.bases.weight_formats.gguf import GGUF
from loramux_shared.bases.weight_formats.gptq import GPTQ
from loramux_shared.bases.weight_formats.mxfp4 import MXFP4
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.ports import registered

QUANTIZE: Final = "quantize_config.json"
"""The file in which AutoGPTQ said how weights are kept, before ``config.json`` did."""
KEYS: Final = ("quantization_config", "compression_config", QUANTIZE)
"""The second is what compressed-tensors wrote first; under the third `with_quantize` puts that file."""
FORMATS: Final = (FP8, FBGEMM_FP8, COMPRESSED_TENSORS, GPTQ, AWQ, BITSANDBYTES, MXFP4, GGUF)


def load_formats() -> tuple[WeightFormat, ...]:
    """Return the formats that are read; those of third parties come last."""
    return (*FORMATS, *registered("weight_format", WeightFormat).values())


def read_quantization(*levels: Mapping[str, Any], architecture: str) -> Quantization | None:
    """Read the first ``quantization_config`` of a config's levels; None where weights are kept as they are.

    Raises:
        CheckpointInvalid: a format, or something of it, that is not read, with what is.
    """
    for fields in levels:
        for key in KEYS:
            if fields.get(key):
                block = HfConfig(fields, architecture).block(key)
                return _read(HfConfig(block.fields, architecture, at=f"{key}."))
    return None


def says_quantization(fields: Mapping[str, Any]) -> bool:
    """Return True if the fields of a ``config.json`` describe quantized weights."""
    text = fields.get("text_config")
    return any(level.get(key) for level in (fields, text if isinstance(text, dict) else {}) for key in KEYS)


def with_quantize(fields: Mapping[str, Any], quantize: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return the fields of a ``config.json`` with those of the `QUANTIZE` beside it, if they say nothing.

    Without a method they are AutoGPTQ's, which had but one; newer gptqmodel calls it ``method``.
    """
    if quantize is None or says_quantization(fields):
        return fields
    method = quantize.get("quant_method") or quantize.get("method") or "gptq"
    return {**fields, QUANTIZE: {**quantize, "quant_method": method}}


def _read(config: HfConfig) -> Quantization:
    served = {method: each for each in load_formats() for method in each.methods}
    method = config.fields.get("quant_method")
    if method is None and (config.fields.get("load_in_4bit") or config.fields.get("load_in_8bit")):
        method = "bitsandbytes"  # early configs of bitsandbytes lack quant_method
    if not isinstance(method, str) or method not in served:
        raise CheckpointInvalid(
            f"config.json: {config.at}quant_method {method!r} is not supported; supported: "
            f"{', '.join(served)}, and weights in bfloat16, float16 or float32."
        )
    return served[method].read(config)
