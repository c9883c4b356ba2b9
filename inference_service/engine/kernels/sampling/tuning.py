"""The tiles of the sampler; others than those in these tables are not shipped.

Every entry is compiled ahead of time for every architecture in the tests: no spills. The numbers are reasoned,
not yet timed.

A row of logits is large (128k in float32 are 512 KB), and one program reads about 0.1 MB per microsecond from
L2. So the race, which every row runs, is split over the vocabulary: a batch of one is 32 programs at 128k, and
the combination costs nothing, because the largest of maxima is exact. In the search for a threshold each pass
needs the one before, so it is one program per row. A pass cuts the interval in four, and the search stops when
one token or one value is left in it: after at most 16 passes for float32 and 8 for bfloat16; counted on random
rows of 32k to 262k logits, 5 to 13 and 5 to 8. Top-k with top-p are two searches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from inference_service.engine.kernels.launch import RowTile


@dataclass(frozen=True)
class PickConfig:
    """Tiles of one row: ``lines`` of ``block`` for the search, one for the race."""

    lines: int
    """A thread has so many loads of 16 bytes in flight, and sums them up before anything else."""
    block: int
    num_warps: int


@dataclass(frozen=True)
class EditConfig:
    """Lists of one row: so many entries at once, and tiles of the row where all of it must be looked at."""

    entries: int
    block: int
    num_warps: int


RACE: Final = RowTile(4096, num_warps=8)
SHAPE: Final = RowTile(2048, num_warps=8)
EDIT: Final = EditConfig(256, 8192, num_warps=8)
PICK: Final[Mapping[int, PickConfig]] = {
    2: PickConfig(2, 4096, num_warps=16),
    4: PickConfig(8, 1024, num_warps=8),
}
"""Configurations by the bytes of a logit."""
