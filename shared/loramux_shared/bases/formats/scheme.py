"""Storage formats of weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from loramux_shared.bases.hf_config import HfConfig

Numbers = Literal["fp8", "int8", "int4", "nf4", "fp4", "mxfp4"]
FormatName = Literal["fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4"]


@dataclass(frozen=True)
class WeightScheme:
    """The storage format of a linear's weight."""

    numbers: Numbers
    rows: int | None = None
    """Rows that share a scale; None: all."""
    columns: int | None = None
    """Columns that share a scale; None: all."""
    zero_points: bool = False
    """True if zero is stored as another number than 0, which lies beside the scale."""

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many scales a weight of that shape has, down and across."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


@dataclass(frozen=True)
class Quantization:
    """The storage formats of a checkpoint's weights; weights that are stored whole are served whole."""

    format: FormatName
    schemes: tuple[WeightScheme, ...]
    """Formats that a weight may have; its tensors tell which one it has."""
    rounds_activations: bool = False
    """True if the format's own engines round the inputs of a linear, too.

    Widened weights are used without that.
    """
    columns_are_ordered: bool = False
    """True if each weight must have the group of each of its columns."""
    zeros_less_one: bool = False
    """True if zero points are stored less one, as in GPTQ's first version."""

    @property
    def label(self) -> str:
        """For people, for example ``gptq (int4)``."""
        numbers = dict.fromkeys(scheme.numbers for scheme in self.schemes)
        plain = [name for name in numbers if name != self.format]
        return f"{self.format} ({', '.join(plain)})" if plain else self.format


@dataclass(frozen=True)
class Format:
    """A format that is read."""

    name: FormatName
    methods: tuple[str, ...]
    """``quant_method`` of ``quantization_config``."""
    reads: str
    """Description of what is read, for people."""
    read: Callable[[HfConfig], Quantization]
    """Raises CheckpointInvalid for what is not read."""
