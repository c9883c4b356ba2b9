"""The types of GGUF's tensors that have blocks, unpacked as the products take them."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from inference_service.engine.kernels.blocks import WeightBlocks


class BlockType(NamedTuple):
    """A type of blocks."""

    values: int
    """Values of a block."""
    num_bytes: int
    unpack: Callable[[Tensor], WeightBlocks]
    """Takes the bytes of rows, uint8 [rows, blocks, bytes]."""
    stays: bool = True
    """False if no product takes it, so that it is widened at load."""


LEVELS: Final = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
"""The values of IQ4's numbers."""
ROWS: Final = 256
"""Rows whose levels are looked up at once, which takes four times their numbers."""


def _halves(data: Tensor) -> Tensor:
    """Return the float16 of bytes [rows, blocks, 2 n], [rows, blocks * n]."""
    return data.contiguous().view(torch.float16).flatten(1)


def _nibbles(data: Tensor) -> Tensor:
    """Return numbers [rows, blocks, n, 2, bytes] of bytes [rows, blocks, n, bytes], lower halves first."""
    return torch.stack([data & 15, data >> 4], dim=3)


def _bits(data: Tensor, each: int) -> Tensor:
    """Return numbers of so many bits [..., 8 / each, bytes] of bytes [..., bytes], from the lowest on."""
    shifts = torch.arange(0, 8, each, dtype=torch.uint8)[:, None]
    return data[..., None, :] >> shifts & ((1 << each) - 1)


def _plain(*, bits: int, offset: bool) -> Callable[[Tensor], WeightBlocks]:
    """Return what unpacks 32 values with a scale, an offset where there is one, and 4 bits, or 5, apart."""

    def unpack(data: Tensor) -> WeightBlocks:
        head = 4 if offset else 2
        numbers = _nibbles(data[:, :, None, -16:]).flatten(2)
        if bits == 5:
            fifth = _bits(data[:, :, head : head + 4].unsqueeze(-1), 1)  # of eight values each byte
            numbers |= fifth.flatten(2) << 4
        offsets = _halves(data[:, :, 2:4]) if offset else None
        return WeightBlocks(numbers.flatten(1), bits, _halves(data[:, :, :2]), offsets)

    return unpack


def _q8_0(data: Tensor) -> WeightBlocks:
    numbers = data[:, :, 2:].flatten(1) ^ 128  # from a number with a sign to one that is 128 larger
    return WeightBlocks(numbers, 8, _halves(data[:, :, :2]))


def _k(bits: int) -> Callable[[Tensor], WeightBlocks]:
    """Return what unpacks 256 values of 4 or 5 bits, whose scales and offsets have two parts."""

    def unpack(data: Tensor) -> WeightBlocks:
        numbers = _nibbles(data[:, :, -128:].reshape(*data.shape[:2], 4, 32)).flatten(
            2, 3
        )  # [rows, blocks, 8, 32]
        if bits == 5:
            numbers |= _bits(data[:, :, 16:48], 1) << 4
        six = data[:, :, 4:16].reshape(*data.shape[:2], 3, 4)
        first, second, rest = six.unbind(2)
        scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], dim=2)
        offsets = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=2)
        parts, offset_parts = (each.flatten(1).view(torch.int8) for each in (scales, offsets))
        return WeightBlocks(
            numbers.flatten(1), bits, _halves(data[:, :, :2]), -_halves(data[:, :, 2:4]), parts, offset_parts
        )

    return unpack


def _q6_k(data: Tensor) -> WeightBlocks:
    low = _nibbles(data[:, :, :128].reshape(*data.shape[:2], 2, 64)).view(*data.shape[:2], 2, 4, 32)
    high = _bits(data[:, :, 128:192].reshape(*data.shape[:2], 2, 32), 2)
    numbers = (low | high << 4).flatten(1)
    parts = data[:, :, 192:208].flatten(1).view(torch.int8)
    return WeightBlocks(numbers, 6, _halves(data[:, :, 208:]), parts=parts)


def _q3_k(data: Tensor) -> WeightBlocks:
    """Return numbers of 3 bits as those of 6, which have such scales."""
    numbers = _bits(data[:, :, 32:96].reshape(*data.shape[:2], 2, 32), 2).flatten(2)
    numbers |= _bits(data[:, :, :32], 1).flatten(2) << 2
    low, high = _nibbles(data[:, :, None, 96:104]).flatten(2), _bits(data[:, :, 104:108], 2).flatten(2)
    parts = (low | high << 4).flatten(1).to(torch.int8) - 32
    return WeightBlocks((numbers + 28).flatten(1), 6, _halves(data[:, :, 108:]), parts=parts)


def _q2_k(data: Tensor) -> WeightBlocks:
    """Return numbers of 2 bits, whose offsets are of halves of blocks: they are only widened."""
    numbers = _bits(data[:, :, 16:80].reshape(*data.shape[:2], 2, 32), 2).flatten(1)
    parts, offset_parts = (
        each.flatten(1).to(torch.int8) for each in (data[:, :, :16] & 15, data[:, :, :16] >> 4)
    )
    scales, offsets = _halves(data[:, :, 80:82]), -_halves(data[:, :, 82:])
    return WeightBlocks(numbers, 2, scales, offsets, parts, offset_parts)


def _levels(numbers: Tensor) -> Tensor:
    """Return IQ4's values as numbers of 8 bits whose zero is 128."""
    table, flat = (LEVELS + 128).to(torch.uint8), numbers.flatten(1)
    return torch.cat([table[flat[begin : begin + ROWS].int()] for begin in range(0, len(flat), ROWS)])


def _iq4_nl(data: Tensor) -> WeightBlocks:
    return WeightBlocks(_levels(_nibbles(data[:, :, None, 2:])), 8, _halves(data[:, :, :2]))


def _iq4_xs(data: Tensor) -> WeightBlocks:
    numbers = _levels(_nibbles(data[:, :, 8:].reshape(*data.shape[:2], 8, 16)))
    low, high = (
        _bits(part, each).transpose(2, 3) for part, each in ((data[:, :, 4:8], 4), (data[:, :, 2:4], 2))
    )
    parts = (low.flatten(2) | high.flatten(2) << 4).flatten(1).to(torch.int8) - 32
    return WeightBlocks(numbers, 8, _halves(data[:, :, :2]), parts=parts)


BLOCK_TYPES: Final = {
    "Q4_0": BlockType(32, 18, _plain(bits=4, offset=False)),
    "Q4_1": BlockType(32, 20, _plain(bits=4, offset=True)),
    "Q5_0": BlockType(32, 22, _plain(bits=5, offset=False)),
    "Q5_1": BlockType(32, 24, _plain(bits=5, offset=True)),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k, stays=False),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _k(4)),
    "Q5_K": BlockType(256, 176, _k(5)),
    "Q6_K": BlockType(256, 210, _q6_k),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
}
