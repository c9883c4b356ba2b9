"""The key of a prefix, ``hash(parent hash, the tokens of a block)``, and the length that is found.

The parent of a first block is the adapter's digest with the cache salt, so that keys and values, and states, of
another version are never met, and those of an adapter that left and came back are found again. Blocks before an
activated adapter acts are the base's own; of the first one behind them, digest and position are part.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from hashlib import blake2b
from itertools import cycle
from typing import Protocol

from inference_service.core.sequence import Sequence


class CacheKind(Protocol):
    """A kind of cache content."""

    def longest(self, seq: Sequence, most: int) -> int:
        """Leading blocks of a sequence, most at most, behind which this kind can serve its rows."""
        ...


def prefix_key(seq: Sequence, index: int, block_size: int) -> int:
    """The key of the first ``index + 1`` blocks of a sequence; it keeps it, for its tokens only become more."""
    known = seq.progress.hashes
    begins = seq.invocation // block_size if seq.invocation else None
    while len(known) <= index:
        parent = known[-1] if known else _seed(seq)
        if len(known) == begins and seq.adapter is not None:
            parent = _digest(f"{parent}:{seq.adapter.digest}:{seq.invocation}")
        tokens = seq.progress.tokens[len(known) * block_size : (len(known) + 1) * block_size]
        known.append(_digest(",".join(map(str, (parent, *tokens)))))
    return known[index]


def agreed(kinds: Seq[CacheKind], seq: Sequence, most: int) -> int:
    """Return the most leading blocks behind which every kind can serve."""
    content = 0
    for kind in cycle(kinds):
        if content == len(kinds) or not most:
            break
        found = kind.longest(seq, most)
        content = content + 1 if found == most else 1
        most = found
    return most


def _seed(seq: Sequence) -> int:
    digest = seq.adapter.digest if seq.adapter and not seq.invocation else ""
    return _digest(f"{digest}:{seq.cache_salt}") if digest or seq.cache_salt else 0


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest())
