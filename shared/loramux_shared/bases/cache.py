"""The cache that layers keep of a sequence, and its division among them.

Layers that see equally far are a group with blocks of its own; layers that carry a state have a slot of it for
every sequence, and slots for snapshots of prefixes. All sizes follow from one number, the blocks of a group
that sees everything. A group with a window has what all sequences at once hold of it, where there is memory for
that. Where there is not, the best division depends on how long sequences are: short ones want as many blocks of
every group, the longest ones few of a window. A group with a window then has `Cache.share` of the blocks, with
which either kind finds the same part of what its best division would serve: more than half, and so does any
other.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

from loramux_shared.bases.config import ModelConfig

SNAPSHOTS: Final = 3
"""Bytes of keys and values for each of snapshots of states."""
NEAREST: Final = 256
"""Tokens between two of them at least: chunks of prompts end there, and shorter ones would be slower."""
SCALE_BYTES: Final = 2
"""Bytes of the scale of a head of keys, or of values, of a token, in 8 bits."""
SLACK: Final = 64
"""A group with a window has one block more for so many: admission leaves some free for those under way."""


@dataclass(frozen=True)
class KeptTokens:
    """The cache entry that the layers of a group keep for a token."""

    window: int | None
    """Positions that they see; None: all."""
    token_bytes: int


@dataclass(frozen=True)
class Cache:
    """The requested content of the cache."""

    groups: tuple[KeptTokens, ...]
    """Groups in the order of the model's windows."""
    block_size: int
    longest: int
    """Tokens of the longest sequence that may be asked for."""
    seqs: int
    """Sequences that are served at once."""
    rows: int
    """Rows of a step."""
    whole: bool
    """True if a sequence of the longest kind must fit; False if sequences are cut to what fits."""
    kv_bytes: int | None = None
    """Its size, where the settings say it."""
    state_bytes: int = 0
    """A sequence's state, of all layers that carry one."""
    every_seat: bool = True
    """True if so many sequences must have a state.

    False if as many do as have one in as much memory as the tokens take.
    """
    snapshots: bool = True
    """True if prefixes are cached."""

    @property
    def token_bytes(self) -> int:
        """Return the bytes of a token that all layers see."""
        return sum(group.token_bytes for group in self.groups)

    @property
    def behind_bytes(self) -> int:
        """Return the bytes of a token that is behind all windows."""
        return sum(group.token_bytes for group in self.groups if group.window is None)

    @property
    def most(self) -> int:
        """Blocks of all sequences at their longest."""
        return self.seqs * self.longest // self.block_size

    def blocks(self, count: int) -> tuple[int, ...]:
        """The blocks of each group, where one that sees everything has so many."""
        return tuple(self._blocks(group.window, count) for group in self.groups)

    def share(self, window: int) -> float:
        """Blocks of a group with a window, for each of one that sees everything, where memory is scarce.

        With B bytes in all and t of a token, B / t tokens of short sequences can be served; of the longest,
        which hold a part h of their tokens in a group, B / sum(t h). This is the ratio of both.
        """
        longest = sum(group.token_bytes * self._held(group.window) for group in self.groups)
        return max(longest / self.token_bytes, self._held(window))

    def seats(self, count: int) -> int:
        """Sequences that may run beside so many blocks."""
        if not self.state_bytes or self.every_seat:
            return self.seqs
        return min(self.seqs, max(1, self._block_bytes(count) // self.state_bytes))

    def snapshot_states(self, count: int) -> int:
        """Snapshots of states beside so many blocks."""
        if not self.state_bytes or not self.snapshots:
            return 0
        return self._block_bytes(count) // SNAPSHOTS // self.state_bytes

    def spacing(self, count: int) -> int | None:
        """Blocks between two snapshots: one prompt that had all blocks would use all. None: there are none."""
        snapshots = self.snapshot_states(count)
        return max(-(-count // snapshots), -(-NEAREST // self.block_size)) if snapshots else None

    def num_bytes(self, count: int) -> int:
        """All of it, where a group that sees everything has so many blocks."""
        return self._block_bytes(count) + (self.seats(count) + self.snapshot_states(count)) * self.state_bytes

    def fitting(self, num_bytes: int) -> int:
        """Return the most blocks that fit into so many bytes; below 0: not even the states fit."""
        return bisect_right(range(self.most + 1), num_bytes, key=self.num_bytes) - 1

    def capacity(self, count: int) -> int:
        """Tokens of the longest sequence that may run alone, up to the longest that may be asked for."""
        sizes = zip(self.groups, self.blocks(count), strict=True)
        return min(self._alone(group.window, number) for group, number in sizes)

    def enough(self, window: int | None) -> int:
        """Blocks that are never lacking: what all sequences hold, each at its place, and a step's rows."""
        if window is None:
            return self.most
        held = self.seqs * (window_blocks(window, 1, self.block_size) + 1)
        enough = held + -(-self.rows // self.block_size)
        return min(self.most, enough + enough // SLACK + 1)

    def _block_bytes(self, count: int) -> int:
        pairs = zip(self.blocks(count), self.groups, strict=True)
        return self.block_size * sum(number * group.token_bytes for number, group in pairs)

    def _blocks(self, window: int | None, count: int) -> int:
        if window is None:
            return count
        scarce = max(
            math.ceil(self.share(window) * count), window_blocks(window, self.block_size, self.block_size)
        )
        return min(count, scarce, self.enough(window))

    def _held(self, window: int | None) -> float:
        """The part of its tokens that the longest sequence holds."""
        if window is None:
            return 1.0
        return min(1.0, window_blocks(window, 1, self.block_size) * self.block_size / self.longest)

    def _alone(self, window: int | None, number: int) -> int:
        if window is not None and number >= window_blocks(window, self.block_size, self.block_size):
            return self.longest
        return min(self.longest, number * self.block_size)


def window_blocks(window: int, rows: int, block_size: int) -> int:
    """Return how many blocks a sequence holds at most of a window, in a step with so many rows of it.

    What the first row sees, the rows, a block at each end that is not whole, and one more: a block is given
    back when the next one is full.
    """
    return (window + rows - 3) // block_size + 3


def cache_entries(config: ModelConfig, item_bytes: int, *, rounded: bool = False) -> tuple[KeptTokens, ...]:
    """Return what the groups of a model's layers keep, in the order of its windows; rounded: in 8 bits."""
    window_bytes = dict.fromkeys(config.windows, 0)
    for mixer in config.attentions:
        numbers = mixer.cached_features
        scales = numbers // mixer.head_dim * SCALE_BYTES
        window_bytes[mixer.attention.window] += numbers + scales if rounded else numbers * item_bytes
    return tuple(KeptTokens(window, token_bytes) for window, token_bytes in window_bytes.items())
