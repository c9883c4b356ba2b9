"""Numbers of 4 or 8 bits, from words and bytes."""

from functools import cache
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.models.packed import WHOLE, Pieces
from loramux_shared.bases.weight_format import WeightScheme

WORD: Final = 32
NO_NUMBER: Final = 255
"""The value of E8M0 that is no number."""
NUMBERS: Final[dict[int, str]] = {4: "int4", 8: "int8"}


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the numbers of words [..., n] in float32 [..., n * 32 / bits], from the lowest bits on."""
    data = words.contiguous().view(torch.uint8)
    return data.float() if bits == 8 else looked_up(data, pairs(tuple(range(16))))


@cache
def pairs(values: tuple[float, ...], *, upper_first: bool = False) -> Tensor:
    """Return what each byte means that holds two of sixteen values by their numbers.

    [256], two float32 in each element: they are looked up together, which halves the time.
    """
    byte, table = torch.arange(256), torch.tensor(values, dtype=torch.float32)
    halves = (byte >> 4, byte & 15) if upper_first else (byte & 15, byte >> 4)
    return torch.stack([table[half] for half in halves], dim=1).view(torch.int64).flatten()


def looked_up(data: Tensor, table: Tensor) -> Tensor:
    """Return the values of bytes [..., n], by a table of `pairs`, in float32 [..., 2 * n]."""
    found = table.index_select(0, data.flatten().int()).view(torch.float32)
    return found.view(*data.shape[:-1], 2 * data.shape[-1])


def powers(exponents: Tensor) -> Tensor:
    """Return the powers of two in float32 that exponents of E8M0 mean."""
    twos = exponents.int() - 127
    return torch.ldexp(torch.ones_like(twos, dtype=torch.float32), twos)


def bits_of(pieces: Pieces, role: str, words: int, columns: int) -> int:
    """Return the bits of a row's numbers, by the words that it takes.

    Raises:
        CheckpointInvalid: neither 4 nor 8 bits take so many, or the config has none of so many.
    """
    stored = {scheme.numbers for scheme in pieces.quantization.schemes}
    for bits, numbers in NUMBERS.items():
        if -(-columns * bits // WORD) == words and numbers in stored:
            return bits
    raise pieces.invalid(
        role, f"expected {columns} numbers of {' or '.join(sorted(stored))}, found {words} words."
    )


def groups_of(pieces: Pieces, role: str, scheme: WeightScheme, groups: int) -> Tensor | None:
    """Return the group of each column; None where groups are of columns that follow each other.

    Raises:
        CheckpointInvalid: a column is of a group that does not exist.
    """
    columns = pieces.shape[-1]
    if pieces.maybe(role) is None:
        return None
    index = pieces.take(role, WHOLE, (columns,)).long()
    if bool((index == -1).all()):  # as compressed-tensors fills it where nothing is ordered
        return None
    low, high = (int(index.min()), int(index.max())) if columns else (0, 0)
    if low < 0 or high >= groups:
        raise pieces.invalid(role, f"expected groups from 0 to {groups - 1}, found {low} to {high}.")
    in_turn = torch.arange(columns) // (scheme.columns or columns)
    return None if torch.equal(index, in_turn) else index
