"""The number of bits in which a replica holds the linears of a base."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Rounding(StrEnum):
    """The format to which the weights of a base's linears are rounded when they are loaded."""

    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def of_head(self) -> Rounding:
        """Return what a head is rounded to: 8 bits of integers, where layers have 4 of them."""
        return {Rounding.INT4: Rounding.INT8, Rounding.FP8: Rounding.NONE}.get(self, self)

    def weight_bytes(self, count: int, item_bytes: int) -> int:
        """Return what so many weights take that would be numbers of item_bytes; without scales of rows."""
        if self is Rounding.INT4:
            return count // 2 + 2 * count // INT4_GROUP
        return count * (item_bytes if self is Rounding.NONE else 1)


INT4_GROUP: Final = 32
"""Values of a row that share a scale at 4 bits."""
