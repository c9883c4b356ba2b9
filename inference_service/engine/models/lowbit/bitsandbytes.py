"""The formats of bitsandbytes.

Blocks of a flat weight in nf4 and fp4 (QLoRA, arXiv 2305.14314), int8 by rows.
"""

from typing import Any, Final

import torch
from torch import Tensor

from inference_service.engine.models.lowbit.words import looked_up, pairs
from inference_service.engine.models.packed import Pieces
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.untrusted_json import JsonInvalid, parse_json

NF4: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution (QLoRA, appendix E)."""
FP4: Final = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
"""A sign, two bits of an exponent and one of a fraction, of the largest, 12."""
TABLES: Final[dict[str, tuple[float, ...]]] = {"nf4": NF4, "fp4": FP4}
STATE: Final = {f"weight.quant_state.bitsandbytes__{numbers}": numbers for numbers in TABLES}
TYPES: Final = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
PER_127: Final = 7.874015718698502e-3
"""1 / 127, as which bitsandbytes writes it."""
BLOCKS: Final = frozenset(1 << power for power in range(5, 13))
FLAT: Final = 0
"""``weight_format`` of rows side by side; the others were for GPUs of one kind."""


class FourBits:
    """Two numbers a byte, the first in the upper half; blocks of them share the largest magnitude.

    A weight of this format is of the type that it was quantised from, which its state names: it is rounded to
    that one first, as bitsandbytes does.
    """

    turned, matrices = False, 1

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        self.rows, self.columns = pieces.matrix()
        count = self.rows * self.columns
        role = next(role for role in STATE if role in pieces.tensors)
        state = _state(pieces, role)
        self._block, self._dtype = _block(state, "blocksize", pieces), TYPES[_type_of(state, pieces)]
        numbers = "nf4" if STATE[role] == "nf4" else "fp4"
        self.scheme = pieces.scheme(numbers, [1, 1], self.rows, self.columns)
        levels = pieces.take("weight.quant_map", (torch.float32,), (16,))
        if not torch.equal(levels, torch.tensor(TABLES[numbers])):
            raise pieces.invalid(
                "weight.quant_map", f"expected the sixteen numbers of {numbers}, found others."
            )
        data = pieces.take("weight", (torch.uint8, *TYPES.values())).contiguous().view(torch.uint8).flatten()
        if len(data) != -(-count // 2):
            raise pieces.invalid("weight", f"expected {-(-count // 2)} bytes, found {len(data)}.")
        self._data = data
        self._largest = self._magnitudes(state, -(-count // self._block))

    def _magnitudes(self, state: dict[str, Any], blocks: int) -> Tensor:
        """Return the largest magnitude of each block, which may be quantised itself."""
        pieces = self.pieces
        if "weight.nested_absmax" not in pieces.tensors:
            return pieces.take("weight.absmax", (torch.float32,), (blocks,))
        index = pieces.take("weight.absmax", (torch.uint8,), (blocks,)).long()
        table = pieces.take("weight.nested_quant_map", (torch.float32,), (256,))
        block = _block(state, "nested_blocksize", pieces)
        outer = pieces.take("weight.nested_absmax", (torch.float32,), (-(-blocks // block),))
        offset = state.get("nested_offset")
        if not isinstance(offset, float):
            raise pieces.invalid("weight.quant_state", f"nested_offset: expected a number, found {offset!r}.")
        return table[index] * outer.repeat_interleave(block)[:blocks] + torch.tensor(offset)

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows in float32."""
        del matrix
        first, last = begin * self.columns, end * self.columns
        table = pairs(TABLES[self.scheme.numbers], upper_first=True)
        values = looked_up(self._data[first // 2 : -(-last // 2)], table)[: last - first]
        block = first // self._block
        largest = self._largest[block : -(-last // self._block)].repeat_interleave(self._block)
        values.mul_(largest[first - block * self._block :][: last - first])
        return values.to(self._dtype).float().view(end - begin, self.columns)


class EightBits:
    """Rows of int8, and the largest magnitude of each."""

    turned, matrices = False, 1

    def __init__(self, pieces: Pieces) -> None:
        """Take the tensors.

        Raises:
            CheckpointInvalid: they do not go together.
        """
        self.pieces = pieces
        self.rows, self.columns = pieces.matrix()
        self._weight = pieces.take("weight", (torch.int8,), pieces.shape)
        self._largest = pieces.take("SCB", (torch.float32,), (self.rows,), (self.rows, 1)).reshape(-1, 1)
        self.scheme = pieces.scheme("int8", [self.rows, 1], self.rows, self.columns)
        if "weight_format" in pieces.tensors:
            kind = pieces.take("weight_format", (torch.uint8,)).flatten().tolist()
            if kind != [FLAT]:
                raise pieces.invalid("weight_format", f"expected {FLAT}, rows side by side, found {kind}.")

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows in float32."""
        del matrix
        return (self._weight[begin:end] * self._largest[begin:end]).mul_(PER_127)


def _state(pieces: Pieces, role: str) -> dict[str, Any]:
    """Return what is written beside a weight; its shape and its numbers must be those that are meant."""
    data = bytes(pieces.take(role, (torch.uint8,)).flatten().tolist())
    try:
        state = parse_json(data)
    except JsonInvalid as error:
        raise pieces.invalid(role, "expected JSON.") from error
    if not isinstance(state, dict):
        raise pieces.invalid(role, "expected an object.")
    for key, expected in (("shape", list(pieces.shape)), ("quant_type", STATE[role])):
        if state.get(key) != expected:
            raise pieces.invalid(role, f"{key}: expected {expected}, found {state.get(key)!r}.")
    return state


def _block(state: dict[str, Any], key: str, pieces: Pieces) -> int:
    size = state.get(key)
    if type(size) is not int or size not in BLOCKS:
        raise pieces.invalid(
            "weight.quant_state", f"{key}: expected a power of two up to 4096, found {size!r}."
        )
    return size


def _type_of(state: dict[str, Any], pieces: Pieces) -> str:
    name = state.get("dtype")
    if not isinstance(name, str) or name not in TYPES:
        raise _unknown_type(pieces, name)
    return name


def _unknown_type(pieces: Pieces, name: Any) -> CheckpointInvalid:
    return pieces.invalid("weight.quant_state", f"dtype: expected {', '.join(TYPES)}, found {name!r}.")
