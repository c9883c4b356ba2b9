"""How weights of few bits are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from loramux_shared.bases.hf_config import HfConfig

Numbers = Literal["fp8", "int8", "int4", "nf4", "fp4", "mxfp4"]
FormatName = Literal["fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4"]


@dataclass(frozen=True)
class WeightScheme:
    """How the weight of a linear is kept."""

    numbers: Numbers
    rows: int | None = None
    """Rows that share a scale; None: all."""
    columns: int | None = None
    """Columns that share a scale; None: all."""
    zero_points: bool = False
    """Whether zero is kept as another number than 0, which stands beside the scale."""

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many scales a weight of that shape has, down and across."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are kept; those that its file has as they are, are served as they are."""

    format: FormatName
    schemes: tuple[WeightScheme, ...]
    """That a weight may have. Which of them it has, its tensors say."""
    rounds_activations: bool = False
    """Whether the format's own engines round what a linear reads, too. Widened weights are used without."""
    columns_are_ordered: bool = False
    """Whether each weight must say which group its columns are of."""
    zeros_less_one: bool = False
    """Whether zero points are stored less one, as GPTQ's first version has them."""

    @property
    def shown(self) -> str:
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
    """What of it, for people."""
    read: Callable[[HfConfig], Quantization]
    """Raises CheckpointInvalid for what is not read."""
