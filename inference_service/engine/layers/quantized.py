"""Linears of rounded weights: the one that a device has, and that by torch, which every device has."""

from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels.integers import PIECE, Quantized, quantize
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.on_gpu import Fp8Linear
from loramux_shared.faults import SettingsInvalid
from loramux_shared.runtime import Rounding


class QuantizedLinear(Linear):
    """A linear whose weight is widened whenever it is used, a piece at a time: on any device, in any type."""

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.values.shape
        self._bias = None if bias is None else bias.float()
        self._bits, self._scales = weight.bits, weight.scales
        values = weight.values
        self._values = values if weight.bits == 8 else (values[:, ::2] & 15) | (values[:, 1::2] << 4)

    def product(self, x: Tensor) -> Tensor:
        """Return [T, out]; sums are float32, and rounded once."""
        wide = x.float()
        rows = max(1, PIECE // self.in_features)
        pieces = zip(torch.split(self._values, rows), torch.split(self._scales, rows), strict=True)
        out = torch.cat([self._piece(wide, values, scales) for values, scales in pieces], dim=1)
        return (out if self._bias is None else out + self._bias).to(x.dtype)

    def _piece(self, x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        if self._bits == 8:
            return (x @ values.float().t()) * scales.float().t()
        both = torch.stack([values << 4 >> 4, values >> 4], dim=-1)  # low and high half of each byte
        return x @ Quantized(both.view(len(values), -1), scales, 4).widened().t()


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
    """Raise SettingsInvalid where a device cannot multiply weights that are rounded so."""
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
