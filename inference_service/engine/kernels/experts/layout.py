"""The data between kernels: the experts of each token, and tokens by expert."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """The experts of each token."""

    ids: Tensor
    """int32 or int64 [T, k]: no expert twice in a row."""
    weights: Tensor
    """float32 [T, k]: what the experts' outputs are multiplied with before they are summed."""

    @property
    def pairs(self) -> int:
        """Pairs of a token and an expert; pair i is that of token i // k."""
        return self.ids.numel()


@dataclass(frozen=True)
class ByExpert:
    """The pairs of a step by expert, and within an expert by token; shared by all products of a layer."""

    tokens: Tensor
    """Integers [pairs]: the token of each place."""
    experts: Tensor
    """Integers [pairs]: the expert of each place."""
    places: Tensor
    """Integers [pairs]: the place of each pair."""
    tiles: Tensor
    """Integers [tiles, 3]: expert, first place, first place behind; those that are not used hold nothing."""
    top_k: int
    """Pairs of a token."""


def most_tiles(pairs: int, num_experts: int, tile: int) -> int:
    """Enough for any step of so many pairs: an expert of n takes ceil(n / tile)."""
    return min(pairs, num_experts + pairs // tile)
