"""The places of adapters in the bank: extents of one arena, without a byte of theirs."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from loramux_shared.faults import InternalFault, ResourcesExhausted

ALIGNMENT: Final = 64
"""Bytes, a cache line: every extent begins at a multiple and takes up a multiple."""


def taken_by(size: int) -> int:
    """Return the bytes that an extent for so many takes up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Place:
    """A place for an adapter, and the adapters that must leave it first."""

    offset: int
    leaving: tuple[int, ...] = ()
    """The occupants, in the order of their addresses."""


class _Taken(NamedTuple):
    """An occupant's bytes."""

    start: int
    end: int
    owner: int


class _Extent(NamedTuple):
    """A hole, or what an occupant could be made to leave."""

    start: int
    size: int
    owner: int | None = None
    used: int = 0
    """When the owner was used last."""


class Places:
    """The extents of an arena, each an adapter's, named by a number of the caller's.

    What it answers takes time that is linear in the number of extents. It decides nothing: `find` only says
    what could be, and nothing changes until the caller gives back and takes.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes: Final = num_bytes // ALIGNMENT * ALIGNMENT
        """Bytes that extents can take up together."""
        self._starts: list[int] = []
        self._taken: list[_Taken] = []
        """Extents by address, as `_starts`."""
        self._start_of: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        """Free bytes, in any number of holes."""
        return self.num_bytes - sum(taken.end - taken.start for taken in self._taken)

    def find(self, size: int, last_used: Callable[[int], int | None]) -> Place | None:
        """Return where so many bytes can go, or None while too much may not leave.

        A hole if one is large enough, the smallest that is. Otherwise neighbours leave, holes between them
        included: those whose most recently used one was used longest ago; of equals those that are fewest
        bytes, then those at the lowest address.

        Args:
            size: bytes.
            last_used: when an occupant was used last, a number that grows; None where it may not leave.

        Raises:
            ResourcesExhausted: more bytes than the arena has.
        """
        needed = self._require(size)
        runs = self._runs(last_used)
        holes = [each for run in runs for each in run if each.owner is None and each.size >= needed]
        if holes:
            return Place(min(holes, key=lambda hole: (hole.size, hole.start)).start)
        windows = [window for run in runs for window in _windows(run, needed)]
        return min(windows, key=lambda window: window[0])[1] if windows else None

    def take(self, owner: int, offset: int, size: int) -> None:
        """Give bytes to an occupant; raise InternalFault where it has some, or these are not free."""
        end = offset + self._require(size)
        at = bisect_left(self._starts, offset)
        before = self._taken[at - 1].end if at else 0
        behind = self._starts[at] if at < len(self._starts) else self.num_bytes
        if owner in self._start_of or offset % ALIGNMENT or offset < before or end > behind:
            raise InternalFault(
                f"adapter {owner} cannot have the bytes {offset} to {end} of the bank: it has a place, or they "
                f"are not free; free there are {before} to {behind}"
            )
        self._starts.insert(at, offset)
        self._taken.insert(at, _Taken(offset, end, owner))
        self._start_of[owner] = offset

    def largest(self, last_used: Callable[[int], int | None]) -> int:
        """Return the bytes that would lie in one piece if all occupants left that may, as `find` has it."""
        return max(sum(extent.size for extent in run) for run in self._runs(last_used))

    def give_back(self, owner: int) -> None:
        """Take an occupant's bytes back; raise InternalFault where it has none."""
        if owner not in self._start_of:
            raise InternalFault(f"adapter {owner} has no place in the bank to give back")
        at = bisect_left(self._starts, self._start_of.pop(owner))
        del self._starts[at], self._taken[at]

    def _require(self, size: int) -> int:
        """Return the bytes that an extent of a size takes up, if the arena can have it."""
        if size < 1:
            raise InternalFault(f"an adapter of {size} bytes asked for a place in the bank")
        needed = taken_by(size)
        if needed > self.num_bytes:
            raise ResourcesExhausted(
                f"an adapter of {needed:,} bytes does not fit the bank of {self.num_bytes:,} bytes. "
                "Give the bank more memory, or lower the adapter's rank."
            )
        return needed

    def _runs(self, last_used: Callable[[int], int | None]) -> list[list[_Extent]]:
        """Return holes and occupants that may leave, by address; those that may not are between the runs."""
        runs: list[list[_Extent]] = [[]]
        at = 0
        for taken in self._taken:
            if taken.start > at:
                runs[-1].append(_Extent(at, taken.start - at))
            used = last_used(taken.owner)
            if used is None:
                runs.append([])
            else:
                runs[-1].append(_Extent(taken.start, taken.end - taken.start, taken.owner, used))
            at = taken.end
        if at < self.num_bytes:
            runs[-1].append(_Extent(at, self.num_bytes - at))
        return runs


def _windows(run: list[_Extent], needed: int) -> Iterator[tuple[tuple[int, int, int], Place]]:
    """Yield the shortest window that is large enough for each end, with what it is judged by.

    Longer windows are no better: who leaves of the shortest leaves of them too.
    """
    first = size = leaving = 0
    recent: deque[tuple[int, int]] = deque()  # (last use, index), the most recent use first
    for last, extent in enumerate(run):
        size += extent.size
        if extent.owner is not None:
            leaving += extent.size
            while recent and recent[-1][0] <= extent.used:
                recent.pop()
            recent.append((extent.used, last))
        while size - run[first].size >= needed:
            size -= run[first].size
            leaving -= 0 if run[first].owner is None else run[first].size
            if recent[0][1] == first:
                recent.popleft()
            first += 1
        if size >= needed:
            begins = first - 1 if first and run[first - 1].owner is None else first
            owners = tuple(each.owner for each in run[first : last + 1] if each.owner is not None)
            yield (recent[0][0], leaving, run[begins].start), Place(run[begins].start, owners)
