"""``python -m tests.golden.formats.write``: files of low-bit libraries, and their widened values.

They are no dependencies of the tests, being large and at odds with each other: install what is to be written
again (bitsandbytes, compressed-tensors, autoawq, gptqmodel), some with ``--no-deps``. Files of a library that
is not there stay as they are. Ordered columns were last written by compressed-tensors 0.10.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A linear in a format."""

    name: str
    config: dict[str, Any]
    """The ``quantization_config``."""
    tensors: dict[str, Tensor]
    """Tensors without ``layer.``."""
    widened: list[Tensor]
    """Widened weights in each type in which the library widens them."""


def weight(rows: int, columns: int) -> Tensor:
    """A weight with rows of other sizes, and values that are far out."""
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    values[::5, ::7] *= 6
    return values


def compressed() -> Iterator[Case]:
    """Yield the tensors of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    of_int = {"type": "int"}
    packed = {
        "int4-group": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "int4-zeros": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "int4-channel": {"num_bits": 4, "strategy": "channel"},
        "int8-channel-zeros": {"num_bits": 8, "strategy": "channel", "symmetric": False},
        "int8-group": {"num_bits": 8, "strategy": "group", "group_size": 64},
    }
    if version("compressed-tensors").startswith("0.10."):
        packed = {"int4-ordered": {**packed["int4-group"], "actorder": "group"}}
        cases = {(name, "pack-quantized"): {**of_int, **args} for name, args in packed.items()}
    else:
        cases = {(name, "pack-quantized"): {**of_int, **args} for name, args in packed.items()} | {
            ("w8a8", "int-quantized"): {**of_int, "num_bits": 8, "strategy": "channel"},
            ("w8a8-zeros", "int-quantized"): {
                **of_int,
                "num_bits": 8,
                "strategy": "tensor",
                "symmetric": False,
            },
            ("fp8-tensor", "float-quantized"): {"type": "float", "num_bits": 8, "strategy": "tensor"},
            ("fp8-channel", "float-quantized"): {"type": "float", "num_bits": 8, "strategy": "channel"},
            ("fp8-block", "naive-quantized"): {
                "type": "float",
                "num_bits": 8,
                "strategy": "block",
                "block_structure": [16, 32],
            },
        }
    for (name, compressor), args in cases.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        for dtype in (torch.bfloat16, torch.float32) if name == "int4-zeros" else (torch.bfloat16,):
            tensors, widened = _through_compressor(compressor, scheme, dtype)
            group = {"targets": ["Linear"], "weights": args, "input_activations": None}
            yield Case(
                f"compressed-{name}{'-float32' * (dtype == torch.float32)}",
                {
                    "quant_method": "compressed-tensors",
                    "format": compressor,
                    "config_groups": {"group_0": group},
                },
                tensors,
                [widened],
            )


def _through_compressor(name: str, scheme: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    from compressed_tensors.compressors import BaseCompressor

    values = weight(40, 128).to(dtype)
    args = scheme.weights
    scale, zeros = _calibrated(values, args)
    state = {"weight": values, "weight_scale": scale, "weight_zero_point": zeros}
    if args.actorder:
        return _through_old_compressor(BaseCompressor, name, state, args)
    compressor = BaseCompressor.get_value_from_registry(name)
    retained = compressor.compress(state, scheme)
    return retained, compressor.decompress(dict(retained), scheme)["weight"]


def _through_old_compressor(
    base: Any, name: str, state: dict[str, Tensor], args: Any
) -> tuple[dict[str, Tensor], Tensor]:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    group_of = torch.empty(128, dtype=torch.int32)
    group_of[order] = torch.arange(128, dtype=torch.int32) // args.group_size
    compressor = base.load_from_registry(name)
    retained = compressor.compress_weight(
        weight=state["weight"],
        scale=state["weight_scale"],
        zero_point=state["weight_zero_point"],
        g_idx=group_of,
        quantization_args=args,
    )
    retained = {f"weight_{key.removeprefix('weight_')}": value for key, value in retained.items()}
    retained |= {"weight_scale": state["weight_scale"], "weight_g_idx": group_of}
    return retained, compressor.decompress_weight(dict(retained), args)


def _calibrated(values: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams

    grouped = {
        "tensor": lambda: (values.amin().reshape(1), values.amax().reshape(1)),
        "channel": lambda: (values.amin(1, keepdim=True), values.amax(1, keepdim=True)),
        "group": lambda: values.unflatten(1, (-1, args.group_size)).aminmax(dim=2),
        "block": lambda: _padded(values, *args.block_structure).aminmax(dim=-1),
    }
    low, high = grouped[args.strategy]()
    found: tuple[Tensor, Tensor] = calculate_qparams(low, high, args)
    return found


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """Return blocks [down, across, rows * columns], padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % columns, 0, -values.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return blocks.permute(0, 2, 1, 3).flatten(2)


def bitsandbytes() -> Iterator[Case]:
    """Yield the tensors of bitsandbytes.

    Its kernel for CPUs (0.50.2) gives rows that end within a block scales of others; its plain code is right.
    """
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as plainly

    for numbers, nested, dtype in (
        ("nf4", False, torch.float32),
        ("nf4", True, torch.bfloat16),
        ("fp4", True, torch.float16),
    ):
        rows, columns = (64, 320) if nested else (30, 96)
        data, state = bnb.quantize_4bit(
            weight(rows, columns).to(dtype), quant_type=numbers, compress_statistics=nested
        )
        described = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": numbers, "bnb_4bit_use_double_quant": nested}
        yield Case(
            f"bitsandbytes-{numbers}{'-double' * nested}",
            {"quant_method": "bitsandbytes", **config},
            {"weight": data, **described},
            [bnb.dequantize_4bit(data, state)]
            if nested
            else [plainly(data.flatten(), state.absmax, state.code, state.blocksize, state.shape, dtype)],
        )
    values, largest, _ = bnb.int8_vectorwise_quant(weight(30, 96).half())
    yield Case(
        "bitsandbytes-int8",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": values, "SCB": largest, "weight_format": torch.zeros((), dtype=torch.uint8)},
        [bnb.int8_vectorwise_dequant(values, largest)],
    )


def gptq() -> Iterator[Case]:
    """Yield the tensors of gptqmodel."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    for name, bits, group, symmetric, ordered, less_one in (
        ("int4", 4, 32, True, False, True),
        ("int4-ordered", 4, 32, False, True, True),
        ("int4-v2", 4, 64, False, False, False),
        ("int8", 8, -1, True, False, True),
    ):
        rows, columns = 64, 128
        sizes = {"in_features": columns, "out_features": rows}
        layer = TorchLinear(bits, group, symmetric, ordered, **sizes, register_buffers=True)
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight(rows, columns)
        groups = torch.arange(columns) // (group if group > 0 else columns)
        if ordered:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(2))]
        scale, zeros = _fitted(linear.weight.data, groups, bits, symmetric)
        layer.pack_block(linear, scale, zeros, groups.int())
        layer.post_init()
        widened = layer.dequantize_weight().T.contiguous()
        stored = layer.qzeros - (0x11111111 if bits == 4 else 0x01010101) * less_one
        config = {"bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered}
        yield Case(
            f"gptq-{name}",
            {
                "quant_method": "gptq",
                "checkpoint_format": "gptq" if less_one else "gptq_v2",
                **config,
            },
            {"qweight": layer.qweight, "qzeros": stored, "scales": layer.scales, "g_idx": layer.g_idx},
            [widened],
        )


def _fitted(values: Tensor, groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scales and zero points [rows, groups]."""
    most, count = 2**bits - 1, int(groups.max()) + 1
    parts = [values[:, groups == group] for group in range(count)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], dim=1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], dim=1)
    if symmetric:
        scale = torch.maximum(-low, high) * 2 / most
        return scale, torch.full_like(scale, (most + 1) // 2)
    scale = (high - low) / most
    return scale, torch.round(-low / scale)


def awq() -> Iterator[Case]:
    """Yield the tensors of AutoAWQ."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    linear = torch.nn.Linear(128, 64, bias=False)
    linear.weight.data = weight(64, 128)
    scale, zeros = _fitted(linear.weight.data, torch.arange(128) // 32, 4, symmetric=False)
    scale = scale.half().float()
    layer = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.T, zeros=zeros.T)
    widened = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).T.contiguous()
    tensors = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    yield Case("awq-int4", config, tensors, [widened])


def main() -> None:
    """Write the files of every installed library."""
    for library, cases in (
        ("compressed-tensors", compressed),
        ("bitsandbytes", bitsandbytes),
        ("gptqmodel", gptq),
        ("autoawq", awq),
    ):
        try:
            written_by = f"{library} {version(library)}"
        except PackageNotFoundError:
            continue
        for case in cases():
            tensors = {f"layer.{name}": tensor.contiguous() for name, tensor in case.tensors.items()}
            for widened in case.widened:
                tensors[f"widened.{str(widened.dtype).removeprefix('torch.')}"] = widened.contiguous()
            about = {"config": json.dumps(case.config), "written_by": written_by}
            save_file(tensors, FOLDER / f"{case.name}.safetensors", metadata=about)


if __name__ == "__main__":
    main()
