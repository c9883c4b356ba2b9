"""Blocks mean what llama.cpp's dequantisation says, and products are those of these weights."""

from ctypes import CDLL

import gguf
import pytest
import torch

from inference_service.engine.kernels.cpu.ops import CpuOps
from inference_service.engine.models.gguf_blocks import BLOCK_TYPES
from loramux_shared.gguf.header import SIZES, WHOLE
from tests.kernels.conftest import compiled as compiled
from tests.support.gguf_files import random_blocks

ROWS, WIDTH = 80, 2560
"""More than one block of K in float32, and columns that are no whole panels."""


def both(kind: str, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of rows as they are unpacked, and the weight that gguf's own code makes of them."""
    data = random_blocks(kind, rows, WIDTH)
    raw = torch.from_numpy(data).view(rows, -1, BLOCK_TYPES[kind].num_bytes)
    return raw, torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_products_in_float32_are_those_of_dequantised_weights_bit_for_bit(kind: str, compiled: CDLL) -> None:
    """Unpacked, and decoded in registers for one row, a few and many, they are the very weights."""
    ops = CpuOps(compiled, torch.float32)
    raw, weight = both(kind)
    blocks = BLOCK_TYPES[kind].unpack(raw)
    assert torch.equal(blocks.widened(), weight)
    assert torch.equal(blocks.part(torch.arange(9, 48), slice(256, 768)).widened(), weight[9:48, 256:768])
    if not BLOCK_TYPES[kind].stays:
        return
    with pytest.raises(ValueError, match="end within a group of"):
        blocks.part(torch.arange(2), slice(8, 256))
    tiled, whole = ops.tiled_blocks([blocks]), ops.tiled(weight)
    for rows in (1, 9, 70):
        x = torch.randn(rows, WIDTH)
        assert torch.equal(ops.linear(x, tiled), ops.linear(x, whole))


def test_parts_of_several_types_are_one_linear_of_rows_of_8_bits(compiled: CDLL) -> None:
    """A row's answer in bfloat16 depends on that row alone, and is near that of whole rows."""
    ops = CpuOps(compiled, torch.bfloat16)
    kinds = sorted((kind for kind, each in BLOCK_TYPES.items() if each.stays), key=lambda kind: kind == "Q6_K")
    parts = [both(kind, 16 if kind != "Q6_K" else 40) for kind in kinds]
    blocks = [BLOCK_TYPES[kind].unpack(raw) for kind, (raw, _) in zip(kinds, parts, strict=True)]
    tiled, bias = ops.tiled_blocks(blocks), torch.randn(16 * (len(kinds) - 1) + 40).bfloat16()
    assert tiled is not None
    with_bias = ops.tiled_blocks(blocks, bias)
    x = torch.randn(9, WIDTH).bfloat16()
    out = ops.linear(x, tiled)
    assert torch.equal(torch.cat([ops.linear(row[None], tiled) for row in x]), out)
    expected = x.float() @ torch.cat([weight for _, weight in parts]).t()
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(ops.linear(x, with_bias).float(), expected + bias.float(), rtol=0.05, atol=0.5)
    assert ops.tiled_blocks(blocks[::-1]) is None, "a part ends within a tile"


def test_sizes_of_types_are_those_of_llama_cpp() -> None:
    """The values and bytes of a block are those of the gguf package, for every type that is read."""
    sizes = {name: tuple(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]) for name in SIZES}
    assert sizes == SIZES
    assert {name: tuple(each[:2]) for name, each in BLOCK_TYPES.items()} == {
        name: size for name, size in SIZES.items() if name not in WHOLE
    }
