"""A format in which checkpoints keep weights of 8 or 4 bits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid


@dataclass(frozen=True)
class WeightScheme:
    """The storage format of a linear's weight."""

    numbers: str
    """Type of its numbers: int4, fp8, blocks ...; a format of another package may have others."""
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

    format: str
    schemes: tuple[WeightScheme, ...]
    """Formats that a weight may have; its tensors tell which one it has."""
    columns_are_ordered: bool = False
    """True if each weight must have the group of each of its columns."""
    zeros_less_one: bool = False
    """True if zero points are stored less one, as in GPTQ's first version."""
    types: tuple[str, ...] = ()
    """Types of blocks of a file of GGUF, whose linears and tables take so many bytes."""
    linear_bytes: int = 0
    table_bytes: int = 0

    @property
    def in_blocks(self) -> bool:
        """True if weights are blocks, which a CPU multiplies as they are."""
        return any(scheme.numbers == "blocks" for scheme in self.schemes)

    @property
    def label(self) -> str:
        """For people, for example ``gptq (int4)``."""
        numbers = dict.fromkeys(self.types or [scheme.numbers for scheme in self.schemes])
        plain = [name for name in numbers if name != self.format]
        return f"{self.format} ({', '.join(plain)})" if plain else self.format


@dataclass(frozen=True)
class WeightFormat:
    """A format of weights of few bits that is read: an entry of the port `weight_format`."""

    name: str
    methods: tuple[str, ...]
    """``quant_method`` of ``quantization_config``."""
    reads: str
    """Description of what is read, for people."""
    read: Callable[[HfConfig], Quantization]
    """Raises CheckpointInvalid for what is not read."""
    layouts: Callable[[], Sequence[object]] | None = None
    """Returns the `PackedLayout`s of its weights. A replica, or the process that widens weights for a builder,
    asks for them, so they may import torch.
    """


def block_of(config: HfConfig, key: str) -> tuple[int, int]:
    """Return the rows and columns of a block; raise CheckpointInvalid for no pair of positive integers."""
    block = config.array(key) or []
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointInvalid(
            f"config.json: {config.at}{key}: expected two positive integers, found {config.fields.get(key)!r}."
        )
    return block[0], block[1]
