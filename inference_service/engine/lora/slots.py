"""The slots of a bank that hold an adapter: what all backends check and keep of them."""

from collections.abc import Iterable, Sequence

import numpy as np

from inference_service.engine.lora.packed import PackedAdapter
from inference_service.engine.lora.places import ALIGNMENT
from inference_service.engine.lora.vocabulary import Vocabularies
from loramux_shared.bases.groups import GroupShape
from loramux_shared.faults import InternalFault


class Slots:
    """The slots of a bank, on the engine's thread."""

    def __init__(self) -> None:
        self.num_slots = 0
        """Slots that were opened."""
        self.vocabularies = Vocabularies()
        """Embeddings and heads that adapters in slots have of their own."""
        self._arena_bytes = self._max_rank = 0
        self._opened = False
        self._held: dict[int, int] = {}
        """Linears that each adapter adds to, by its slot: a bit for each linear."""
        self._first: dict[int, int] = {}
        """The first layer that each adapter adds to, by its slot."""

    @property
    def num_bytes(self) -> int:
        """Bytes that adapters may take."""
        return self._arena_bytes

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of tables that each slot takes, in use or not: many, where layers have experts."""
        return 0

    def open(self, num_bytes: int, max_rank: int, num_slots: int, host_bytes: int = 0) -> None:  # noqa: ARG002 - nothing is locked
        """Make the arena and the slots, once; no adapter has a larger rank in any module.

        A GPU copies from host memory that is locked: what is packed lies in host_bytes of it, where these do.
        Raise InternalFault where it is open already.
        """
        if self._opened:
            raise InternalFault(
                "the bank is open already: its memory may be recorded in graphs and cannot change"
            )
        self._opened = True
        self._arena_bytes, self._max_rank, self.num_slots = num_bytes, max_rank, num_slots

    def require_within(self, packed: PackedAdapter, offset: int) -> None:
        """Raise `InternalFault` unless a place is one that the arena has."""
        if offset < 0 or offset % ALIGNMENT or offset + packed.num_bytes > self._arena_bytes:
            raise InternalFault(
                f"an adapter of {packed.num_bytes} bytes cannot lie at {offset} of the bank's "
                f"{self._arena_bytes} bytes: it must lie within them, at a multiple of {ALIGNMENT}"
            )

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Give a slot to what was copied: steps that begin from now on find it there.

        Raises:
            InternalFault: there is no such slot, it is taken, the rank is above what was opened, or what was
                copied does not lie within the arena.
        """
        self.require_within(packed, offset)
        if not 0 <= slot < self.num_slots or slot in self._held:
            raise InternalFault(f"slot {slot} cannot be taken: it is, or it is not one of {self.num_slots}")
        if packed.max_rank > self._max_rank:
            raise InternalFault(
                f"an adapter of rank {packed.max_rank} cannot enter a bank that was opened for {self._max_rank}"
            )
        linears = np.packbits(packed.linears, bitorder="little").tobytes()
        self._held[slot] = int.from_bytes(linears, "little")
        adapted = np.flatnonzero(packed.linears.any(axis=1))
        self._first[slot] = int(adapted[0]) if adapted.size else len(packed.linears)

    def leave(self, slot: int) -> None:
        """Empty a slot; a later reference to it gets an error or nothing, never another adapter. Raise
        InternalFault for an empty one.
        """
        if self._held.pop(slot, None) is None:
            raise InternalFault(f"slot {slot} holds no adapter that could leave")
        del self._first[slot]
        self.vocabularies.leave(slot)

    def first_layer(self, slot: int) -> int:
        """Return the first layer that the adapter of a slot adds to; their number, if to none."""
        return self._first[slot]

    def touched(self, slots: Iterable[int]) -> int:
        """Return a bit for each linear that one of the adapters of these slots adds to; raise InternalFault for
        an empty slot.
        """
        bits = 0
        for slot in slots:
            if slot not in self._held:
                raise InternalFault(f"a step has rows of slot {slot}, which holds no adapter")
            bits |= self._held[slot]
        return bits


def experts_of(groups: Sequence[GroupShape], num_layers: int) -> list[int]:
    """Return for each layer the bits, as in `Slots.touched`, of the linears that are experts'."""
    of_layer = sum(1 << index for index, group in enumerate(groups) if group.expert is not None)
    return [of_layer << layer * len(groups) for layer in range(num_layers)]
