"""The part of a decoder, and of its adapters, that one rank of a tensor-parallel replica has."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.groups import GroupShape


class Part(NamedTuple):
    """The part of a fused linear."""

    inputs: slice
    outputs: tuple[slice | list[int], ...]
    """Columns of each slice of the linear, within the slice."""
    widths: tuple[int, ...]
    """How many these are."""
    is_sum: bool
    """True if what the ranks compute must be summed: each has some of the inputs."""


@dataclass(frozen=True)
class Shard:
    """A rank of several, and the decoder that they compute together."""

    whole: ModelConfig
    rank: int
    world: int
    config: ModelConfig
    """The decoder that each rank computes: `ModelConfig.shard` of the whole."""

    @property
    def is_first(self) -> bool:
        """True for the rank that adds once what all would add: biases of sums."""
        return self.rank == 0

    @cached_property
    def _own(self) -> dict[str, GroupShape]:
        return {group.name: group for group in self.config.groups}

    def part(self, whole: GroupShape) -> Part:
        """Return what the rank has of a fused linear; ranks share pieces where these are fewer."""
        own = self._own[whole.name]
        outputs: list[slice | list[int]] = [*map(self.piece, whole.out_features, own.out_features)]
        if whole.parts:
            pieces = zip(accumulate(whole.parts, initial=0), whole.parts, own.parts, strict=False)
            outputs[0] = [
                at + column for at, *sizes in pieces for column in range(sizes[0])[self.piece(*sizes)]
            ]
        return Part(
            self.piece(whole.in_features, own.in_features),
            tuple(outputs),
            own.out_features,
            own.in_features != whole.in_features,
        )

    def piece(self, whole: int, own: int) -> slice:
        """Return the rank's part of whole columns of which each rank has so many."""
        index = self.rank * (whole // own) // self.world
        return slice(index * own, (index + 1) * own)
