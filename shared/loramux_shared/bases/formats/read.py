"""The reader of ``quantization_config``: returns the storage format of weights, or refuses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loramux_shared.bases.formats.compressed import read_compressed
from loramux_shared.bases.formats.others import (
    read_awq,
    read_bitsandbytes,
    read_fbgemm,
    read_fp8,
    read_gptq,
    read_mxfp4,
)
from loramux_shared.bases.formats.scheme import Format, Quantization
from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid

QUANTIZE: Final = "quantize_config.json"
"""The file in which AutoGPTQ said how weights are kept, before ``config.json`` did."""
KEYS: Final = ("quantization_config", "compression_config", QUANTIZE)
"""The second is what compressed-tensors wrote first; under the third `with_quantize` puts that file."""
FORMATS: Final = (
    Format("fp8", ("fp8",), "e4m3 or e5m2 with scales per block, row or tensor", read_fp8),
    Format("fp8", ("fbgemm_fp8",), "e4m3 with scales per row", read_fbgemm),
    Format(
        "compressed-tensors",
        ("compressed-tensors",),
        "int4 and int8 packed, per group, row or tensor, with or without zero points and g_idx; int8 (W8A8); "
        "FP8 per tensor, row or block; several groups and ignored linears",
        read_compressed,
    ),
    Format(
        "gptq",
        ("gptq",),
        "int4 and int8, both forms of zero points, with or without desc_act; also by `quantize_config.json`",
        read_gptq,
    ),
    Format("awq", ("awq",), "int4 as AutoAWQ packs it for gemm", read_awq),
    Format(
        "bitsandbytes", ("bitsandbytes",), "nf4, fp4, with double quantisation or not; int8", read_bitsandbytes
    ),
    Format("mxfp4", ("mxfp4",), "experts in 3-D, as gpt-oss has them", read_mxfp4),
)


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
    served = {method: format_ for format_ in FORMATS for method in format_.methods}
    method = config.fields.get("quant_method")
    if method is None and (config.fields.get("load_in_4bit") or config.fields.get("load_in_8bit")):
        method = "bitsandbytes"  # early configs of bitsandbytes lack quant_method
    if not isinstance(method, str) or method not in served:
        raise CheckpointInvalid(
            f"config.json: {config.at}quant_method {method!r} is not supported; supported: "
            f"{', '.join(served)}, and weights in bfloat16, float16 or float32."
        )
    return served[method].read(config)
