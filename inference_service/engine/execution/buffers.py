"""The input of a step, in static tensors on the device that one copy per step fills."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.core.adapter import MOST_PARTS
from inference_service.core.sequence import Sequence
from inference_service.engine.execution.runner import KNOWN, Rows
from inference_service.engine.execution.sampler import row_params, shapes
from inference_service.engine.kernels.attention import AttentionCapacity, AttentionTables, Cut, pack_tables
from inference_service.engine.kernels.delta import DeltaCapacity, DeltaTables, StateChunk, pack_delta
from inference_service.engine.kernels.packing import aligned, sections
from inference_service.engine.kernels.sampling import SamplingTables
from inference_service.engine.kernels.sampling.layout import FIELDS, GENERATED, Kind, packed_row
from inference_service.engine.kernels.sgmv import (
    DECODE_TILE,
    PREFILL_TILE,
    SegmentCapacity,
    Segments,
    pack_segments,
)
from inference_service.engine.lora.segments import Arrangement, entries_of
from loramux_shared.bases.memory import blend_buckets

PAIR: Final = 2
"""Adapters of a row in most mixtures."""
FEW_ROWS: Final = 32
"""Rows up to which the segments of a step with longer chunks are as short as where it decodes."""
_PADDING: Final = np.full(FIELDS, Kind.PADDING, np.int32).tobytes()


@dataclass(frozen=True)
class StepCapacity:
    """The largest size of a step; its launches depend on nothing else."""

    rows: int
    seqs: int
    """Sequences that have rows, and of which each may draw a token."""
    mixed: bool
    """True if chunks may have more rows than one; False if a step decodes, one row per sequence."""
    max_seqs: int
    """Tokens that the step before may have drawn."""
    blocks_per_seq: int
    """Cache blocks of the longest sequence."""
    block_size: int
    cuts: tuple[Cut, ...]
    """Those of the model's layers: each has tables for attention of its own."""
    groups: int
    """Groups of layers whose cache blocks are apart."""
    delta_tile: int | None
    """Rows of a longer chunk that go through a state together; None: no layer carries one."""
    slots: int
    """Slots for adapters, in use or not; 0: there are none."""
    active: int
    """Distinct adapters in one step at most."""

    @property
    def attention(self) -> tuple[AttentionCapacity, ...]:
        """Return the capacities of the attention's tables, in the order of the cuts."""
        sizes = self.rows, self.seqs, self.blocks_per_seq, self.block_size
        return tuple(
            AttentionCapacity(*sizes, cut.tile if self.mixed else None, cut.kv_heads, self.groups)
            for cut in self.cuts
        )

    @property
    def delta(self) -> DeltaCapacity | None:
        """Return the capacity of the tables of states; None where no layer carries one."""
        if self.delta_tile is None:
            return None
        if not self.mixed:
            return DeltaCapacity(self.rows, self.rows)
        return DeltaCapacity(self.rows, self.seqs, self.delta_tile)

    @property
    def tile(self) -> int:
        """Rows of a segment at most."""
        return PREFILL_TILE if self.mixed and self.rows > FEW_ROWS else DECODE_TILE

    @property
    def segments(self) -> SegmentCapacity | None:
        """Return the capacity of the adapters' segments; None without adapters."""
        if not self.slots:
            return None
        return SegmentCapacity(self.rows, self.slots, self.tile, active=self.active, rows=self.rows)

    @property
    def mixed_segments(self) -> tuple[SegmentCapacity, ...]:
        """Return the capacities of steps with blends: of those that decode with two adapters to a row, and of
        all others.
        """
        passes: tuple[int, ...] = (PAIR,) if self.active <= PAIR else (PAIR, MOST_PARTS)
        if not self.slots or not (self.mixed or self.rows in blend_buckets(self.max_seqs)):
            return ()
        return tuple(
            SegmentCapacity(
                self.rows * each, self.slots, self.tile, passes=each, scaled=True, active=self.active
            )
            for each in (passes[-1:] if self.mixed else passes)
        )

    @property
    def sections(self) -> dict[str, slice]:
        """Return the place of each array behind the drawn tokens; arrays that are seldom full come last."""
        return sections(
            {
                "tokens": self.rows,
                "sources": self.rows,
                "positions": self.rows,
                "last_rows": self.seqs,
                "sampling": FIELDS * self.seqs,
                "segments": self.segments.packed_size if self.segments else 0,
                "delta": self.delta.packed_size if self.delta else 0,
                **{name: each.packed_size for name, each in zip(self.tables, self.attention, strict=True)},
                "mixed": max((each.packed_size for each in self.mixed_segments), default=0),
            }
        )

    @property
    def tables(self) -> list[str]:
        """Names of the sections of the attention's tables."""
        return [f"attention {index}" for index in range(len(self.cuts))]

    @property
    def size(self) -> int:
        """int32 elements of all arrays."""
        end: int = self.sections["mixed"].stop
        return end


class StepMemory:
    """The device memory that the buffers of all capacities share, for only one step runs at a time."""

    def __init__(self, max_seqs: int, size: int, vocab: int, device: torch.device) -> None:
        """Take what the largest of the capacities need."""
        self.drawn_size = aligned(max_seqs)
        self.packed = torch.zeros(self.drawn_size + size, dtype=torch.int32, device=device)
        """The tokens that the last step drew, then the arrays of a step."""
        self.drawn = self.packed[:max_seqs]
        self.sampling = SamplingTables.allocate(max_seqs, vocab, device)
        """The sampler's scratch memory."""


class StepBuffers:
    """The static tensors of steps of one capacity."""

    def __init__(self, capacity: StepCapacity, memory: StepMemory) -> None:
        self.capacity = capacity
        self._inputs = memory.packed[: memory.drawn_size + capacity.rows]
        self._packed = memory.packed[memory.drawn_size : memory.drawn_size + capacity.size]
        self._sections = capacity.sections
        self._attention_capacities, self._segment_capacity = capacity.attention, capacity.segments
        self._delta_capacity = capacity.delta
        self._tables = capacity.tables
        self._own = np.arange(memory.drawn_size, memory.drawn_size + capacity.rows, dtype=np.int32)
        """The source of every row whose token is known: the row's own."""
        view = {name: self._packed[where] for name, where in self._sections.items()}
        self._sources = view["sources"]
        self.positions = view["positions"]
        """int32 [rows]"""
        self.last_rows = view["last_rows"]
        """int32 [seqs]: the row that each token is drawn from."""
        self.attention = {
            cut: AttentionTables.over(each, view[name])
            for cut, name, each in zip(capacity.cuts, self._tables, self._attention_capacities, strict=True)
        }
        self.segments: list[Segments] = []
        """Segments of steps without blends, then `StepCapacity.mixed_segments`; of these one is filled."""
        self.parts = 1
        """Adapters that a row of the step has at most."""
        if self._segment_capacity is not None:
            self.segments.append(Segments.over(self._segment_capacity, view["segments"]))
        for each in capacity.mixed_segments:
            self.segments.append(Segments.over(each, view["mixed"][: each.packed_size]))
        self.delta: DeltaTables | None = None
        if self._delta_capacity is not None:
            self.delta = DeltaTables.over(self._delta_capacity, view["delta"])
        scratch = memory.sampling
        rows = view["sampling"].view(-1, FIELDS)
        self.sampling = SamplingTables(
            scratch.vocab, rows, scratch.scores[: capacity.seqs], scratch.ids[: capacity.seqs]
        )

    def tokens(self) -> Tensor:
        """Return the rows' tokens [rows]: from the host, or those that the step before drew."""
        return self._inputs.index_select(0, self._sources)

    def segments_of(self, arrangement: Arrangement) -> Segments | None:
        """Return those that a step fills; None for one of the base alone."""
        if not arrangement.segments:
            return None
        parts = arrangement.most_parts
        fitting = (each for each in self.segments if each.capacity.passes >= parts)
        return next(each for each in fitting if each.capacity.scaled == bool(arrangement.mixed))

    def load(self, rows: Rows) -> None:
        """Fill all of them for a step of at most ``capacity.rows`` rows, with a copy for every part in use."""
        self.parts = rows.arrangement.most_parts
        host = torch.empty(len(self._packed), dtype=torch.int32, pin_memory=self._packed.device.type == "cuda")
        for part in self._pack(rows, host.numpy()):
            self._packed[part].copy_(host[part], non_blocking=True)

    def _pack(self, rows: Rows, host: npt.NDArray[np.int32]) -> list[slice]:
        """Fill the host's copy; return the parts of it that are used."""
        view = {name: host[where] for name, where in self._sections.items()}
        known = {"tokens": rows.tokens, "positions": rows.positions, "last_rows": rows.last_rows}
        for name, values in known.items():
            view[name][: len(values)] = np.array(values, dtype=np.int32)
            view[name][len(values) :] = 0
        view["sources"][:] = self._own
        sources = np.array(rows.sources, dtype=np.int32)
        np.copyto(view["sources"][: len(sources)], sources, where=sources != KNOWN)
        _fill_sampling(view["sampling"].reshape(-1, FIELDS), rows)
        if self._segment_capacity is not None:
            slots = np.full(len(rows.tokens), -1)
            for segment in rows.arrangement.plain:
                slots[segment.start : segment.end] = segment.slot
            pack_segments(self._segment_capacity, slots, out=view["segments"])
        if self._delta_capacity is not None:
            chunks = [StateChunk.of(context) for context in rows.contexts]
            pack_delta(self._delta_capacity, chunks, out=view["delta"])
        used, first = [], 0
        for name, capacity in zip(self._tables, self._attention_capacities, strict=True):
            at: int = self._sections[name].start
            begin, *others = capacity.used(pack_tables(capacity, rows.contexts, out=view[name]))
            used += [slice(first, at + begin.stop), *(slice(at + p.start, at + p.stop) for p in others)]
            first = self._sections[name].stop
        if rows.arrangement.mixed and (segments := self.segments_of(rows.arrangement)) is not None:
            entries, begin = entries_of(rows.arrangement.segments), self._sections["mixed"].start
            part = slice(begin, begin + segments.capacity.packed_size)
            pack_segments(
                segments.capacity, entries.slots, token_ids=entries.rows, scales=entries.scales, out=host[part]
            )
            used.append(part)
        return used


def _fill_sampling(fields: npt.NDArray[np.int32], rows: Rows) -> None:
    """Fill fields [capacity, FIELDS] for the sequences that draw a token; the rest is padding."""
    num = len(rows.sampled)
    generated = [seq.num_generated for seq in rows.sampled]
    packed = b"".join(map(_drawing, rows.sampled, generated))
    fields[:num] = np.frombuffer(packed, np.int32).reshape(num, FIELDS)
    fields[:num, GENERATED] = np.add(generated, rows.ahead)
    fields[num:] = Kind.PADDING


def _drawing(seq: Sequence, generated: int) -> bytes:
    """Return a sequence's parameters of its next draw; padding where `Shaper` draws, for shaped logits."""
    progress = seq.progress
    if shapes(seq, generated):
        return _PADDING
    if not progress.drawing:
        progress.drawing = packed_row(row_params(seq, generated))
    return progress.drawing
