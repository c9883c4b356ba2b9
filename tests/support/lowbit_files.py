"""Checkpoints of few bits, written from the descriptions of their formats, with the weights that they mean."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
LINEARS = ("_proj.weight",)
EXPERTS_IN_3D = ("experts.gate_up_proj", "experts.down_proj")
NF4 = (
    "-1 -.6961928009986877 -.5250730514526367 -.39491748809814453 -.28444138169288635 -.18477343022823334 "
    "-.09105003625154495 0 .07958029955625534 .16093020141124725 .24611230194568634 .33791524171829224 "
    ".44070982933044434 .5626170039176941 .7229568362236023 1"
)
Packed = tuple[dict[str, Tensor], Tensor]
"""A linear in a file: its tensors by their suffix, and the weight in float32."""


@dataclass(frozen=True)
class Kind:
    """A way to keep linears."""

    config: dict[str, Any]
    keep: Callable[[Tensor], Packed]


def _words(numbers: Tensor, bits: int) -> Tensor:
    """Pack the last dimension, from the lowest bits on; the last word is filled with zeros."""
    each = 32 // bits
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[-1] % each))
    shifted = padded.unflatten(-1, (-1, each)) << (bits * torch.arange(each))
    return shifted.sum(-1).to(torch.int64).to(torch.int32)


def _grouped(weight: Tensor, group_of: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return numbers [out, in], scales and zero points [out, groups], and the weight that they mean."""
    count, most = int(group_of.max()) + 1, 2**bits - 1
    parts = [weight[:, group_of == group] for group in range(count)]
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], dim=1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], dim=1)
    scale = ((high - low) / most).half().float()
    zeros = torch.round(-low / scale).clamp(0, most)
    numbers = torch.round(weight / scale[:, group_of] + zeros[:, group_of]).clamp(0, most)
    return numbers, scale, zeros, (numbers - zeros[:, group_of]) * scale[:, group_of]


def _in_turn(weight: Tensor) -> Tensor:
    return torch.arange(weight.shape[1]) // GROUP


def fp8(weight: Tensor, block: int = 32) -> Packed:
    """Square blocks, of which the last may be smaller."""
    down, across = (-(-size // block) for size in weight.shape)
    scale = torch.empty(down, across)
    whole = torch.empty_like(weight)
    numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for row in range(down):
        for column in range(across):
            rows, columns = block * row, block * column
            at = slice(rows, rows + block), slice(columns, columns + block)
            scale[row, column] = weight[at].abs().max() / 448
            numbers[at] = (weight[at] / scale[row, column]).to(torch.float8_e4m3fn)
            whole[at] = numbers[at].float() * scale[row, column]
    return {"weight": numbers, "weight_scale_inv": scale}, whole


def pack_quantized(weight: Tensor) -> Packed:
    """Groups of 16 with zero points."""
    numbers, scale, zeros, whole = _grouped(weight, _in_turn(weight), 4)
    tensors = {
        "weight_packed": _words(numbers, 4),
        "weight_scale": scale.half(),
        "weight_zero_point": _words(zeros.T, 4).T,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, whole


def pack_symmetric(weight: Tensor) -> Packed:
    """Groups of 16 without zero points."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scale = (grouped.abs().amax(2) / 7).half()
    each = scale.float().repeat_interleave(GROUP, dim=1)
    numbers = torch.round(weight / each)
    tensors = {
        "weight_packed": _words(numbers + 8, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, numbers * each


def int_quantized(weight: Tensor) -> Packed:
    """Round with a scale for each row, and a scale for the inputs of a linear."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = torch.round(weight / scale).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale, "input_scale": torch.ones(1)}, numbers * scale


def gptq(weight: Tensor, *, shuffled: bool = True) -> Packed:
    """Columns that are of groups of their own, or not, and zero points less one."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    group_of = _in_turn(weight)[order] if shuffled else _in_turn(weight)
    numbers, scale, zeros, whole = _grouped(weight, group_of, 4)
    zeros = zeros.clamp(min=1)
    whole = (numbers - zeros[:, group_of]) * scale[:, group_of]
    tensors = {
        "qweight": _words(numbers, 4).T,
        "qzeros": _words(zeros.T - 1, 4),
        "scales": scale.T.half(),
        "g_idx": group_of.int(),
        "bias": torch.zeros(len(weight)).half(),  # as AutoGPTQ writes it where there is none
    }
    return tensors, whole


def awq(weight: Tensor) -> Packed:
    """Numbers of a word in AWQ's order."""
    numbers, scale, zeros, whole = _grouped(weight, _in_turn(weight), 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: Tensor) -> Tensor:
        return _words(values.T.unflatten(-1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scale.T.half()}, whole


def nf4(weight: Tensor) -> Packed:
    """Blocks of 64 of the flat weight, whose magnitudes are of eight bits themselves."""
    table = torch.tensor([float(value) for value in NF4.split()])
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    outer_table = torch.linspace(-1, 1, 256)
    largest = flat.abs().amax(1)
    offset = float(torch.tensor(float(largest.mean())))
    padded = torch.nn.functional.pad(largest - offset, (0, -len(largest) % 256)).view(-1, 256)
    outer = padded.abs().amax(1)
    each = outer.repeat_interleave(256)[: len(largest)]
    index = ((largest - offset) / each)[:, None].sub(outer_table).abs().argmin(1)
    magnitudes = outer_table[index] * each + offset
    numbers = (flat[..., None] / magnitudes[:, None, None] - table).abs().argmin(-1)
    whole = (table[numbers] * magnitudes[:, None]).flatten()[: weight.numel()].view(weight.shape)
    codes = numbers.flatten()[: weight.numel()].to(torch.uint8)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape),
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).view(-1, 1),
        "weight.absmax": index.to(torch.uint8),
        "weight.quant_map": table,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": outer_table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    return tensors, whole


def int8(weight: Tensor) -> Packed:
    """The largest magnitude of each row."""
    largest = weight.abs().amax(1)
    numbers = torch.round(weight * 127 / largest[:, None]).to(torch.int8)
    tensors = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, numbers * largest[:, None] * 7.874015718698502e-3


def mxfp4(weight: Tensor) -> Packed:
    """Quantise experts [experts, in, out], stored transposed, in blocks of 32 along the inputs."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    blocks = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.ceil(torch.log2(blocks.abs().amax(-1) / 6))
    powers = torch.exp2(exponents)[..., None]
    numbers = ((blocks / powers)[..., None] - values).abs().argmin(-1)
    whole = (values[numbers] * powers).flatten(-2).transpose(1, 2)
    codes = numbers.to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return {"blocks": packed, "scales": (exponents + 127).to(torch.uint8)}, whole


def _compressed(format_: str, activations: Any = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed",
    }  # fmt: skip


WHOLE_BLOCKS = Kind({"quant_method": "fp8", "weight_block_size": [16, 16]}, partial(fp8, block=16))
"""A kind that transformers reads too: it takes no block that is smaller than the others."""
EXPERTS = Kind({"quant_method": "mxfp4"}, mxfp4)
"""The experts of gpt-oss, in 3-D."""
KINDS = {
    "fp8": Kind({"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}, fp8),
    "pack-quantized": Kind(
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False),
        pack_quantized,
    ),
    "pack-symmetric": Kind(
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP), pack_symmetric
    ),
    "int-quantized": Kind(
        _compressed("int-quantized", {"num_bits": 8, "dynamic": True}, num_bits=8, strategy="channel"),
        int_quantized,
    ),
    "gptq": Kind(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}, gptq
    ),
    "awq": Kind({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "GEMM"}, awq),
    "nf4": Kind({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4),
    "int8": Kind({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
}


def keep(base: Path, kind: Kind, into: Path, widened: Path) -> None:
    """Write a checkpoint with its projections kept in another way, and one with the weights that these mean."""
    tensors = load_file(base / "model.safetensors")
    retained, whole = dict(tensors), dict(tensors)
    experts = kind is EXPERTS
    names = EXPERTS_IN_3D if experts else LINEARS
    for name, tensor in tensors.items():
        if name.endswith(names):
            del retained[name]
            parts, whole[name] = kind.keep(tensor)
            stem = f"{name}_" if experts else name.removesuffix("weight")
            retained |= {stem + part: value for part, value in parts.items()}
    config = json.loads((base / "config.json").read_bytes())
    for folder, content, more in ((into, retained, {"quantization_config": kind.config}), (widened, whole, {})):
        folder.mkdir()
        for file in base.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        (folder / "config.json").write_text(json.dumps(config | more))
        save_file(
            {name: tensor.contiguous() for name, tensor in content.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
