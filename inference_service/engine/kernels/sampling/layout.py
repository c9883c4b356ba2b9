"""The input of the sampler: the parameters of the rows of a step."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.sampling.tuning import RACE

FIELDS = 8
"""int32 per row: kind, 1 / temperature, top-k, top-p, span of min-p, seed (low, high), number of tokens."""
GENERATED = 7
"""The one of them that changes from token to token."""
_ROW = struct.Struct("=ififfQi")
MAX_SHARPNESS = 2.0**64
"""Largest 1 / temperature: the scores of finite logits stay finite."""
ALL = 2**31 - 1
"""Top-k of a row that keeps everything."""


class Kind(IntEnum):
    """The kind of a row's draw, as the device reads it."""

    PADDING = 0
    """Nothing: its id is not touched."""
    GREEDY = 1
    RACE = 2
    """All tokens take part."""
    FILTERED = 3
    """Some take part."""


@dataclass(frozen=True)
class Edits:
    """Changes of a row's logits before its draw on the host: the penalties of some tokens, then additions."""

    tokens: array[int]
    """int32 [D]: distinct tokens of the prompt and the answer."""
    counts: array[float]
    """float32 [D]: how often each occurs in the answer."""
    repetition: float
    """Logits of tokens are divided by it where positive, else multiplied."""
    presence: float
    """Taken from logits of tokens that the answer has."""
    frequency: float
    """Taken from logits, times the counts."""
    added_to: array[int]
    """int32 [A]: tokens, of which some may be there twice."""
    added: array[float]
    """float32 [A]: added to their logits; -inf takes a token out."""


@dataclass(frozen=True)
class RowParams:
    """The parameters of the next draw of one row."""

    temperature: float = 0.0
    """0 is greedy, and the rest is of no interest."""
    top_k: int = 0
    """Number of the most likely tokens that take part, the lower first of equals; 0 is all."""
    top_p: float = 1.0
    """A token takes part while those before it, most likely first, have less than this part of the mass."""
    min_p: float = 0.0
    """Tokens less likely than this part of the most likely one do not take part, before all else."""
    seed: int = 0
    """Its lower 64 bits count."""
    num_generated: int = 0
    """Tokens that the request was given before this one."""
    allowed: bytes | None = None
    """Tokens that may come, bit i % 8 of byte i // 8 for token i; None is all. Draws on the host read it."""
    edits: Edits | None = None
    """Changes of the logits before all else; None where there are none. Draws on the host read them."""

    @property
    def kind(self) -> Kind:
        """Return the device's kind of draw."""
        if self.temperature == 0.0:
            return Kind.GREEDY
        return Kind.FILTERED if self.top_k or self.top_p < 1.0 or self.min_p else Kind.RACE

    @property
    def sharpness(self) -> float:
        """Return the factor of logits; 0 for a greedy row."""
        return min(1.0 / self.temperature, MAX_SHARPNESS) if self.temperature else 0.0

    @property
    def span(self) -> float:
        """Return the largest distance of a logit from the largest that min-p lets pass."""
        return -self.temperature * math.log(self.min_p) if self.min_p else math.inf


def pack_rows(
    capacity: int, rows: Sequence[RowParams | None], *, out: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """The parameters of a step as one int32 array [capacity, FIELDS] ready to copy; the rest is padding.

    Args:
        capacity: what the device buffers were made for.
        rows: parameters of row 0, 1, ... of the logits; None is padding too.
        out: filled instead of a new array, contiguous, for instance the view of a pinned buffer.

    Raises:
        ValueError: more rows than the capacity.
    """
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows, but room for {capacity}")
    packed = np.empty((capacity, FIELDS), dtype=np.int32) if out is None else out
    packed.fill(Kind.PADDING)
    memory = packed.data.cast("B")
    for index, row in enumerate(rows):
        if row is not None:
            _ROW.pack_into(memory, index * _ROW.size, *_fields(row))
    return packed


def packed_row(row: RowParams) -> bytes:
    """The parameters of one row, as they lie in the array of a step."""
    return _ROW.pack(*_fields(row))


def _fields(row: RowParams) -> tuple[int, float, int, float, float, int, int]:
    return (
        row.kind,
        row.sharpness,
        min(row.top_k, ALL) or ALL,
        row.top_p,
        row.span,
        row.seed % 2**64,
        row.num_generated,
    )


@dataclass(frozen=True)
class SamplingTables:
    """The parameters of a step on the device, and the sampler's memory: static buffers.

    Launches made for them stay right for whatever ``load`` puts there.
    """

    vocab: int
    rows: Tensor = field(repr=False)
    """int32 [capacity, FIELDS]"""
    scores: Tensor = field(repr=False)
    """fp32 [capacity, tiles]: the best score of each tile of a row."""
    ids: Tensor = field(repr=False)
    """int32 [capacity, tiles]: whose it is."""

    @classmethod
    def allocate(cls, capacity: int, vocab: int, device: torch.device | str) -> SamplingTables:
        """Buffers for at most ``capacity`` rows of ``vocab`` logits, that hold no row yet."""
        shape = capacity, -(-vocab // RACE.block)
        return cls(
            vocab,
            torch.full((capacity, FIELDS), Kind.PADDING, dtype=torch.int32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
        )

    def load(self, packed: Tensor) -> None:
        """Take over what ``pack_rows`` made: one copy, asynchronous when ``packed`` is pinned."""
        self.rows.copy_(packed, non_blocking=True)
