"""What a decode step reads, in static tensors on the device that one copy per step fills."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.core.sequence import Sequence
from inference_service.engine.rows import KNOWN, Rows
from inference_service.engine.sampler import row_params, shapes
from inference_service.kernels.attention import AttentionCapacity, AttentionTables, pack_tables
from inference_service.kernels.packing import aligned, sections
from inference_service.kernels.sampling import RowParams, SamplingTables, pack_rows
from inference_service.kernels.sampling.layout import FIELDS
from inference_service.kernels.sgmv import DECODE_TILE, SegmentCapacity, Segments, pack_segments

Tables = TypeVar("Tables", AttentionTables, Segments)


@dataclass(frozen=True)
class StepCapacity:
    """How large a decode step may become; a graph that was recorded for it depends on nothing else."""

    rows: int
    """Sequences, one token each."""
    max_seqs: int
    """Tokens that the step before may have drawn."""
    blocks_per_seq: int
    """Cache blocks of the longest sequence."""
    block_size: int
    slots: int
    """Adapters that are loaded; 0: none."""

    @property
    def attention(self) -> AttentionCapacity:
        """Of the attention's tables."""
        return AttentionCapacity(self.rows, self.rows, self.blocks_per_seq, self.block_size)

    @property
    def segments(self) -> SegmentCapacity | None:
        """Of the adapters' segments; None without adapters."""
        return SegmentCapacity(self.rows, self.slots, DECODE_TILE) if self.slots else None

    @property
    def sections(self) -> dict[str, slice]:
        """Where each array lies behind the drawn tokens; the attention's, seldom all used, comes last."""
        return sections(
            {
                "tokens": self.rows,
                "sources": self.rows,
                "positions": self.rows,
                "sampling": FIELDS * self.rows,
                "segments": self.segments.packed_size if self.segments else 0,
                "attention": self.attention.packed_size,
            }
        )

    @property
    def size(self) -> int:
        """int32 elements of all arrays."""
        end: int = self.sections["attention"].stop
        return end


class StepMemory:
    """The device memory that the buffers of all capacities share, for only one step runs at a time."""

    def __init__(self, largest: StepCapacity, vocab: int, device: torch.device) -> None:
        self.drawn_size = aligned(largest.max_seqs)
        self.packed = torch.zeros(self.drawn_size + largest.size, dtype=torch.int32, device=device)
        """The tokens that the last step drew, then the arrays of a step."""
        self.drawn = self.packed[: largest.max_seqs]
        self.sampling = SamplingTables.allocate(largest.max_seqs, vocab, device)
        """For steps that are no decode steps, and the sampler's scratch memory for all."""


class StepBuffers:
    """The static tensors of decode steps of one capacity."""

    def __init__(self, capacity: StepCapacity, memory: StepMemory) -> None:
        self.capacity = capacity
        self._inputs = memory.packed[: memory.drawn_size + capacity.rows]
        self._first = memory.drawn_size
        self._packed = memory.packed[memory.drawn_size :]
        view = {name: self._packed[where] for name, where in capacity.sections.items()}
        self._sources = view["sources"]
        self.positions = view["positions"]
        """int32 [rows]"""
        device = memory.packed.device
        self.attention = _in(view["attention"], AttentionTables.allocate(capacity.attention, device))
        self.segments: Segments | None = None
        if capacity.segments is not None:
            self.segments = _in(view["segments"], Segments.allocate(capacity.segments, device))
        scratch = memory.sampling
        rows = view["sampling"].view(-1, FIELDS)
        self.sampling = SamplingTables(
            scratch.vocab, rows, scratch.scores[: capacity.rows], scratch.ids[: capacity.rows]
        )

    def tokens(self) -> Tensor:
        """Return the rows' tokens [rows]: from the host, or those that the step before drew."""
        return self._inputs.index_select(0, self._sources)

    def load(self, rows: Rows) -> None:
        """Fill all of them for a step of at most ``capacity.rows`` rows, with one copy."""
        host = torch.empty(self.capacity.size, dtype=torch.int32, pin_memory=self._packed.device.type == "cuda")
        used = self._pack(rows, host.numpy())
        self._packed[:used].copy_(host[:used], non_blocking=True)

    def _pack(self, rows: Rows, host: npt.NDArray[np.int32]) -> int:
        """Fill the host's copy; return how many elements of it are used."""
        view = {name: host[where] for name, where in self.capacity.sections.items()}
        num = len(rows.tokens)
        for name, values in (("tokens", rows.tokens), ("positions", rows.positions)):
            view[name][:num] = values
            view[name][num:] = 0
        view["sources"][:] = np.arange(self.capacity.rows) + self._first
        sources = np.array(rows.sources, dtype=np.int32)
        np.copyto(view["sources"][:num], sources, where=sources != KNOWN, casting="same_kind")
        params = view["sampling"].reshape(-1, FIELDS)
        pack_rows(self.capacity.rows, [device_params(seq) for seq in rows.sampled], out=params)
        if self.capacity.segments is not None:
            slots = [chunk.seq.slot for chunk in rows.arrangement.chunks]
            pack_segments(self.capacity.segments, slots, out=view["segments"])
        tables = pack_tables(self.capacity.attention, rows.contexts, out=view["attention"])
        first: int = self.capacity.sections["attention"].start
        return first + len(tables)


def device_params(seq: Sequence) -> RowParams | None:
    """How the next token of a sequence is drawn; None for one that shapes its logits, which `Shaper` draws."""
    return None if shapes(seq, seq.num_generated) else row_params(seq, seq.num_generated)


def _in(packed: Tensor, tables: Tables) -> Tables:
    """Return tables of the same capacity whose arrays lie in other memory."""
    views: dict[str, Any] = {
        name: packed[where].view(old.shape)
        for name, where in tables.capacity.sections.items()
        if (old := getattr(tables, name)) is not None
    }
    return replace(tables, packed=packed, **views)
