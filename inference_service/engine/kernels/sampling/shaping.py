"""The changes of requests to their logits, as data: a row for each, lists behind the rows, and a state that
stays.

The state is of places, one per sequence that shapes its logits: its tokens up to the last one, which the device
alone may know, and its allowed tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.sampling.layout import FIELDS, RowParams, SamplingTables, pack_rows
from inference_service.engine.kernels.sampling.tuning import RACE

SHAPE_FIELDS: Final = 12
"""int32 per row: flags, row, place, three penalties, mask, edits and how many, stops and how many, nothing."""
_ROW: Final = struct.Struct("=iiifffiiiiii")
SHAPED, PENALIZED, RESTRICTED, MASKED = 1, 2, 4, 8
PIECE: Final = 64
"""Rows that are shaped at once: 39 MB in float32 for 152 thousand tokens."""
ALWAYS: Final = -1
"""Mark of an edit that holds after every last token."""

Words = npt.NDArray[np.int32]
NOTHING: Final = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class ShapedRow:
    """The changes to the logits of one row, in this order, and the parameters of its draw."""

    row: int
    """Row of the logits."""
    place: int
    """Place in the state."""
    draw: RowParams
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    restricted: bool = False
    """True if the mask at its place holds."""
    mask: bytes | None = None
    """Tokens that may come next: bit i % 8 of byte i // 8, lowest first, is token i. None is all."""
    edits: Words = field(default_factory=lambda: NOTHING)
    """[E * 3] of a token, behind which other (or `ALWAYS`), and the bits of a float32 that is added then."""
    stops: Words = field(default_factory=lambda: NOTHING)
    """Tokens that may not come unless nothing else is left, each once."""

    @property
    def flags(self) -> int:
        """Return the device's flags."""
        penalized = (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)
        masked = self.mask is not None
        return SHAPED | PENALIZED * penalized | RESTRICTED * self.restricted | MASKED * masked


def words_of(mask: bytes, vocab: int) -> Words:
    """A mask as int32 [ceil(vocab / 32)]; tokens that it does not reach are out."""
    words = np.zeros(num_words(vocab), np.int32)
    memory = words.view(np.uint8)
    own = np.frombuffer(mask, np.uint8)[: len(memory)]
    memory[: len(own)] = own
    return words


def num_words(vocab: int) -> int:
    """int32 elements of a mask."""
    return -(-vocab // 32)


def edits_of(tokens: Sequence[int], after: Sequence[int], values: Sequence[float]) -> Words:
    """Edits, one per token."""
    edits = np.empty((len(tokens), 3), np.int32)
    edits[:, 0], edits[:, 1] = tokens, after
    edits[:, 2] = np.array(values, np.float32).view(np.int32)
    return edits.reshape(-1)


def pack_shapes(rows: Sequence[ShapedRow], vocab: int) -> Words:
    """All of a draw as one int32 array: the rows, how their tokens are drawn, and their lists."""
    at = len(rows) * (SHAPE_FIELDS + FIELDS)
    shapes = bytearray()
    lists = []
    for row in rows:
        mask = NOTHING if row.mask is None else words_of(row.mask, vocab)
        edits, stops = at + len(mask), at + len(mask) + len(row.edits)
        penalties = row.repetition, row.presence, row.frequency
        where = at, edits, len(row.edits) // 3, stops, len(row.stops)
        shapes += _ROW.pack(row.flags, row.row, row.place, *penalties, *where, 0)
        lists += [mask, row.edits, row.stops]
        at = stops + len(row.stops)
    params = pack_rows(len(rows), [row.draw for row in rows])
    return np.concatenate([np.frombuffer(shapes, np.int32), params.reshape(-1), *lists])


class ShapingState:
    """The state that stays on the device from step to step; made when the first request needs it.

    ``loramux_shared.bases.memory.shaping_bytes`` counts it.
    """

    def __init__(self, places: int, vocab: int, device: torch.device | str) -> None:
        self.vocab = vocab
        self.places = places
        self.last = torch.zeros(places, dtype=torch.int32, device=device)
        """int32 [places]: the last token of each answer."""
        self.impossible = torch.zeros(places, dtype=torch.int32, device=device)
        """int32 [rows], not by place: 1 where the last draw found no token."""
        self._counts: Tensor | None = None
        self._masks: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """int32 [places, vocab]: twice how often a token is in the answer, and 1 more where in the prompt."""
        return self.last if self._counts is None else self._counts

    @property
    def masks(self) -> Tensor:
        """int32 [places, words]: tokens that may come at all."""
        return self.last if self._masks is None else self._masks

    @property
    def num_bytes(self) -> int:
        """Return its bytes."""
        held = (self.last, self.impossible, self._counts, self._masks)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def count(self, place: int, counts: Tensor) -> None:
        """Put counts [vocab] at a place."""
        if self._counts is None:
            self._counts = self.last.new_empty(self.places, self.vocab)
        self._counts[place].copy_(counts, non_blocking=True)

    def restrict(self, place: int, mask: Tensor) -> None:
        """Put a mask [words] at a place."""
        if self._masks is None:
            self._masks = self.last.new_empty(self.places, num_words(self.vocab))
        self._masks[place].copy_(mask, non_blocking=True)


@dataclass(frozen=True)
class ShapingTables:
    """The input of one draw, on the device, and memory for it."""

    packed: Tensor = field(repr=False)
    """int32: what ``pack_shapes`` made."""
    shaped: Tensor = field(repr=False)
    """fp32 [M, vocab]"""
    draw: SamplingTables
    drawn: Tensor = field(repr=False)
    """int32 [M]"""

    @classmethod
    def over(cls, packed: Tensor, rows: int, vocab: int) -> ShapingTables:
        """For so many rows, in packed memory of the device that may hold others at each draw."""
        scores = torch.empty(rows, -(-vocab // RACE.block), dtype=torch.float32, device=packed.device)
        params = packed[rows * SHAPE_FIELDS :][: rows * FIELDS].view(rows, FIELDS)
        draw = SamplingTables(vocab, params, scores, torch.empty_like(scores, dtype=torch.int32))
        shaped = torch.empty(rows, vocab, dtype=torch.float32, device=packed.device)
        return cls(packed, shaped, draw, torch.empty(rows, dtype=torch.int32, device=packed.device))
