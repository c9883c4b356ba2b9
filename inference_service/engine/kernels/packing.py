"""Several arrays in the one int32 buffer that a step copies to the device."""

from collections.abc import Mapping
from typing import Final

_ALIGN: Final = 4
"""int32 elements: every array begins at a multiple of 16 bytes."""


def aligned(length: int) -> int:
    """Return the elements that an array of so many takes up."""
    return -(-length // _ALIGN) * _ALIGN


def power_of_two(number: int) -> int:
    """Return the power of two that holds a number."""
    return 1 << (number - 1).bit_length()


def block_of(dim: int) -> int:
    """Return the elements that a kernel takes for a dimension, to multiply along it: 16 at least."""
    return max(16, power_of_two(dim))


def most_tiles(rows: int, chunks: int, tile: int | None) -> int:
    """Return how many tiles of so many rows the chunks of a step have at most; None: all chunks have one row.

    Every chunk of n > 1 rows takes ceil(n / tile) tiles.
    """
    return 0 if tile is None else min(rows, min(chunks, rows // 2) + rows // tile)


def sections(lengths: Mapping[str, int]) -> dict[str, slice]:
    """Return where arrays of these lengths lie, one after the other."""
    found, first = {}, 0
    for name, length in lengths.items():
        found[name] = slice(first, first + length)
        first += aligned(length)
    return found
