"""Adapters and mixtures of them in a replica, and where an activated one begins to act.

Activated: "Activated LoRA", Greenewald et al., 2025, as PEFT reads it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Final

import numpy as np

from loramux_shared.faults import Fault

_ITEM: Final = array("i").itemsize
MOST_PARTS: Final = 8
"""Adapters of a mixture."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Adapter:
    """A version of an adapter in a replica, one for each digest, whatever its names are."""

    digest: str
    """Digest of its bundle; part of every prefix-cache key, so that keys and values of another version are
    never met, and those of one that left and came back are found again.
    """
    slot: int | None = None
    """Its place in the LoRA backend while it is resident; changed on the engine's thread alone."""
    invocation: tuple[int, ...] = ()
    """Tokens from which on it acts; none: it acts on everything. See `activation`."""
    overflows_s: tuple[float, ...] = ()
    """When answers of the last minute held NaN or infinity, on the clock of ``time.monotonic``."""
    unusable: Fault | None = None
    """Why it is refused."""

    @property
    def members(self) -> tuple[Adapter, ...]:
        """Itself: as `Mixture.members`."""
        return (self,)


@dataclass(frozen=True)
class ScaledAdapter:
    """An adapter as a request names it."""

    name: str
    scale: float = 1.0


ScaledSlots = tuple[tuple[int, float], ...]
"""The slots of a mixture, with their scales."""


@dataclass(frozen=True)
class Mixture:
    """Several adapters that act together, or one with a scale: what they add, times the scales, is summed.

    It is what PEFT's ``add_weighted_adapter(combination_type="cat")`` makes of them.
    """

    parts: tuple[tuple[Adapter, float], ...]
    """Each adapter once, in the order of the digests; scales are float32 and not 0."""

    @classmethod
    def of(cls, parts: Iterable[tuple[Adapter, float]]) -> Adapter | Mixture | None:
        """Return the one form of what parts come to: those of one adapter are summed, those of 0 left out.

        An adapter with the scale 1 is that adapter, and no adapter is the base.
        """
        summed: dict[Adapter, float] = {}
        for adapter, scale in parts:
            summed[adapter] = summed.get(adapter, 0.0) + scale
        rounded = ((adapter, float(np.float32(scale))) for adapter, scale in summed.items())
        left = sorted(
            ((adapter, scale) for adapter, scale in rounded if scale), key=lambda part: part[0].digest
        )
        if len(left) == 1 and left[0][1] == 1.0:
            return left[0][0]
        return cls(tuple(left)) if left else None

    @property
    def members(self) -> tuple[Adapter, ...]:
        """The adapters of the blend."""
        return tuple([adapter for adapter, _ in self.parts])

    @cached_property
    def digest(self) -> str:
        """Return the key of its prefixes: the sha256 of all digests, each with its scale to the last bit."""
        text = "+".join(f"{adapter.digest}*{scale.hex()}" for adapter, scale in self.parts)
        return sha256(text.encode()).hexdigest()

    @property
    def slot(self) -> ScaledSlots | None:
        """Return the slots of its adapters, while all of them are resident."""
        slots = tuple([(adapter.slot, scale) for adapter, scale in self.parts if adapter.slot is not None])
        return slots if len(slots) == len(self.parts) else None


def activation(
    adapter: Adapter | Mixture | None, prompt: Sequence[int]
) -> tuple[Adapter | Mixture | None, int]:
    """Return what answers a prompt, and the position of the first token that it acts on.

    An activated adapter acts from the first token of the last place in the prompt where its invocation stands,
    and on all of the answer; a prompt without it is the base's. Others act on everything, and so do mixtures,
    of which no part is activated.
    """
    if not isinstance(adapter, Adapter) or not adapter.invocation:
        return adapter, 0
    place = _last(array("i", prompt), array("i", adapter.invocation))
    return (None, 0) if place is None else (adapter, place)


def _last(tokens: array[int], invocation: array[int]) -> int | None:
    data, part = tokens.tobytes(), invocation.tobytes()
    end = len(data)
    while (found := data.rfind(part, 0, end)) >= 0:
        if found % _ITEM == 0:
            return found // _ITEM
        end = found + len(part) - 1
    return None
