"""Integers of 4 or 8 bits in words of 32."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from inference_service.models.formats.pieces import WHOLE, Pieces
from loramux_shared.bases.formats.scheme import Numbers

WORD: Final = 32
NUMBERS: Final[dict[int, Numbers]] = {4: "int4", 8: "int8"}


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the numbers of words [..., n] as uint8 [..., n * 32 / bits], from the lowest bits on."""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def bits_of(pieces: Pieces, role: str, words: int, columns: int) -> int:
    """Return the bits of a row's numbers, by the words that it takes.

    Raises:
        CheckpointInvalid: neither 4 nor 8 bits take so many, or the config has none of so many.
    """
    kept = {scheme.numbers for scheme in pieces.quantization.schemes}
    for bits, numbers in NUMBERS.items():
        if -(-columns * bits // WORD) == words and numbers in kept:
            return bits
    raise pieces.invalid(
        role, f"expected {columns} numbers of {' or '.join(sorted(kept))}, found {words} words."
    )


def groups_of(pieces: Pieces, role: str, columns: int, groups: int) -> Tensor | None:
    """Return the group of each column; None where the columns follow each other, or nothing says it.

    Raises:
        CheckpointInvalid: a column is of a group that does not exist.
    """
    if pieces.maybe(role) is None:
        return None
    index = pieces.take(role, WHOLE, (columns,)).long()
    if bool((index == -1).all()):  # as compressed-tensors fills it where nothing is ordered
        return None
    low, high = (int(index.min()), int(index.max())) if columns else (0, 0)
    if low < 0 or high >= groups:
        raise pieces.invalid(role, f"expected groups from 0 to {groups - 1}, found {low} to {high}.")
    return index
