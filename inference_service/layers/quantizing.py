"""The linear that a rounded weight becomes on a device."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from inference_service.kernels.integers import quantize
from inference_service.layers.linear import Linear
from inference_service.layers.on_gpu import Fp8Linear
from inference_service.layers.quantized import QuantizedLinear
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rounding import Rounding

CAPABILITY: Final = {Rounding.FP8: (8, 9), Rounding.INT8: (8, 0), Rounding.INT4: (8, 0)}
"""Least capability of a GPU."""
FP8_DTYPE: Final = torch.bfloat16
"""The type of activations beside weights in fp8."""


def new_linear(weight: Tensor, bias: Tensor | None, quantization: Rounding) -> Linear:
    """Return a linear of a weight [out, in] by torch's operations; it stays as it is where it must."""
    if quantization is Rounding.FP8:
        return Fp8Linear(weight, bias) if Fp8Linear.takes(weight) else Linear(weight, bias)
    quantized = quantize(weight, quantization)
    return Linear(weight, bias) if quantized is None else QuantizedLinear(quantized, bias)


def require_able(quantization: Rounding, device: torch.device, dtype: torch.dtype) -> None:
    """Raise where a device cannot multiply weights that are rounded so.

    Raises:
        SettingsInvalid: it cannot.
    """
    if quantization is Rounding.NONE or (device.type == "cpu" and quantization is not Rounding.FP8):
        return
    needed = ".".join(map(str, CAPABILITY[quantization]))
    found, cure = "a CPU", "int8 or int4"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY[quantization] and (quantization is not Rounding.FP8 or dtype is FP8_DTYPE):
            return
        found = f"capability {capability[0]}.{capability[1]} and {str(dtype).removeprefix('torch.')}"
        cure = "none, or LORAMUX_DTYPE=bfloat16 where that is what is missing"
    raise SettingsInvalid(
        f"LORAMUX_QUANTIZATION={quantization} (or runtime.quantization of the deployment) needs a GPU of "
        f"capability {needed} that computes in bfloat16, found {found}. Set {cure}."
    )
