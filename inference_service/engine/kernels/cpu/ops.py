"""The compiled operations with tensors as arguments; shapes and strides are the caller's promise.

Every operation is in place or writes its whole output, takes contiguous rows, and runs in float32 or bfloat16.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from time import perf_counter
from typing import Any, Final, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_service.engine.kernels.blocks import WeightBlocks
from inference_service.engine.kernels.cpu.program import CODES, Buffers, Recorder
from inference_service.engine.kernels.delta import DeltaInputs
from inference_service.engine.kernels.integers import Quantized
from inference_service.engine.kernels.rows import Activation
from inference_service.engine.kernels.sampling import Drawn, Edits, RowParams

BLOCK = 16
"""Positions of a cache block in the compiled attention; the engine's blocks are multiples of it."""
LANES = 16
"""Columns of a tile of weights."""
COMPACT = 12
"""Bits of whole bfloat16 weights that are compact (compact.h)."""
BLOCKS, OFFSET, IN_PARTS = 16, 16, 32
"""Bits that stand for blocks (blocks.h), and what the kind of a tile of them has beside its bits."""
OF_GRANULE = 8
"""Values of K of a tile that are compact together."""
FEW_ROWS, NEVER, NOT_TIMED = 3, 2**62, 2**63 - 1
"""Rows of x from which on widening bfloat16 weights pays, where it does; more than there are; and what a
library says that can multiply them in two ways, until they were timed.
"""
SPARSE = 512
"""Weights for each that no table holds: with more of them, compact ones are not read faster."""
ROUNDED = 32
"""Values of x in bfloat16 that share a step where weights are integers; at most as many share a scale."""
MAX_HEAD_DIM = 512
MAX_CONV_WIDTH = 8
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_SIGNATURES = {
    "linear": "piiippipipiipipipipi",
    "pack": "pi",
    "attention": "pippippiiiiffiip",
    "rope_write": "pppiiiiiipppppii",
    "rms_norm": "pppipiiiffi",
    "layer_norm": "pppppiifi",
    "add": "ppiifi",
    **dict.fromkeys(get_args(Activation), "ppiiii"),
    "delta_rule": "pipipipippppppppiiiiiifpii",
    "draw": "piipipppi",
    "scores": "piiipippppi",
    "exchange": "pipiiii",
}
"""Argument types of each operation: pointer, int64, float."""
_DRAW: Final = struct.Struct("=qdqddQqqqQQqdddQQq")
"""A row of `CpuOps.draw`: sampling.h has the fields."""
_AS_THEY_ARE: Final = (0,) * 10
"""The fields of a row whose logits are not edited."""


Planned = tuple[int, int, int, Sequence[int]]
"""A context: first row, rows, its length with them, cache blocks of BLOCK positions."""


class Table:
    """An int64 array and where it lies; asked for once, since numpy takes a microsecond to tell."""

    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        self.values = np.ascontiguousarray(values)
        self.address: int = self.values.ctypes.data


@dataclass(frozen=True)
class Chunks:
    """The attention plan of a step: int64 [chunks, 4] of first row, rows, context length, address of blocks."""

    table: Table
    blocks: npt.NDArray[np.int32]
    """All block lists, one after the other; the table points into it."""

    @classmethod
    def make(cls, contexts: Sequence[Planned]) -> Chunks:
        """Plan contexts."""
        every, planned = array("i"), []
        for row, length, end, own in contexts:
            planned.append((row, length, end, len(every)))
            every.extend(own)
        blocks = np.array(every, dtype=np.int32)
        table = np.array(planned, dtype=np.int64).reshape(-1, 4)
        table[:, 3] = blocks.ctypes.data + blocks.itemsize * table[:, 3]
        return cls(Table(table), blocks)


class Tiled:
    """A weight [N, K] as `CpuOps.linear` reads it and its bias [N], and where they lie."""

    def __init__(
        self,
        tiles: Tensor,
        bias: Tensor | None,
        columns: int,
        scales: Tensor | None = None,
        bits: int = 0,
        group: int = 0,
        beside: Sequence[Tensor] = (),
    ) -> None:
        """Take tiles, and of integers of so many bits the scales, each of which group values of K share.

        Tiles of blocks are a table, of addresses in what is beside it.
        """
        self.columns, self.saves = columns, bits in (COMPACT, BLOCKS)
        self._kept = tiles, bias, scales, beside
        weight, added, scaled = (None if part is None else part.data_ptr() for part in (tiles, bias, scales))
        self.arguments = weight, added, bits, scaled, group
        """Arguments in the order of the compiled operation."""
        self.num_bytes = sum(each.nbytes for each in (tiles, scales, *beside) if each is not None)
        """Bytes that a product reads of it, without the bias."""


Adapters = tuple[int, int, int, int, int, int, int | None]
"""The adapters of a step in one linear, as the compiled operation takes them: `adapters_of`."""
NO_ADAPTERS: Adapters = (0, 0, 0, 0, 0, 0, None)


def adapters_of(
    address: int, segments: Table, workspace: Tensor, apart: int = 1, parts: Table | None = None
) -> Adapters:
    """Describe the adapters of segments [S, 3] of slot, first row, rows; the caller keeps all of it alive.

    address is that of the first slot's ADAPTER_FIELDS, the next slot's lie ``apart`` times as many behind;
    workspace is float32 [T, most ranks]. Where rows have several segments, which follow one another then,
    parts [S, 3] say of each: the column of the workspace where its ranks begin, how many there are from the
    first on, 0 of the others, and the bits of the scale in float64.
    """
    count = len(segments.values)
    at = None if parts is None else parts.address
    return (address, apart, segments.address, count, workspace.data_ptr(), workspace.stride(0), at)


class CpuOps:
    """The operations for one dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.units = 2 if dtype is torch.bfloat16 else 1
        """Values per 4-byte unit."""
        functions = {name: _function(library, name, dtype) for name in _SIGNATURES}
        self._draw, self._scores = (
            {kind: _function(library, name, kind) for kind in DTYPES} for name in ("draw", "scores")
        )
        library.instructions.restype = ctypes.c_char_p
        self.instructions = str(library.instructions().decode())
        """For which it was compiled: AVX-512, the same with VNNI or with bfloat16, AVX2 or NEON."""
        self.multiplies = not (dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported())
        """True if `linear` is the fastest product of whole weights here: with AMX, oneDNN's is."""
        self._compact = _typed(library.compact, "pippi", ctypes.c_int64)
        self._pack_blocks = _typed(library.pack_blocks, "piiipi")
        self._pack, self._delta_rule = functions["pack"], functions["delta_rule"]
        self._steps = {name: functions[name] for name in CODES}
        """The operations that a program may have."""
        self._exchange_wide = _function(library, "exchange", torch.float32)
        self._empty: Callable[..., Tensor] = torch.empty
        self._run = _typed(getattr(library, f"run_{DTYPES[dtype]}"), "pi")
        self._recording = threading.Lock()
        self.recorder: Recorder | None = None
        """Set while operations are written down."""
        self.compacts = self.compact(torch.zeros(LANES, OF_GRANULE, dtype=dtype)) is not None
        """True if this processor multiplies compact weights."""
        self.widened_from = ctypes.c_int64.in_dll(library, "widened_from")
        """Rows from which on `linear` multiplies whole bfloat16 weights as float32: all where it has to."""
        if self.units == 2 and self.widened_from.value == NOT_TIMED:
            self.widened_from.value = FEW_ROWS if self._widened_is_faster() else NEVER

    def _widened_is_faster(self) -> bool:
        """Return whether float32 is multiplied faster than bfloat16 here, as by Intel's AVX-512."""
        x, weight = torch.ones(64, 512, dtype=self.dtype), torch.ones(36 * LANES, 512, dtype=self.dtype)
        tiled, took = Tiled(weight, None, len(weight)), {1: math.inf, NEVER: math.inf}
        for start in [*took] * 9:
            self.widened_from.value = start
            began = perf_counter()
            self.linear(x, tiled)
            took[start] = min(took[start], perf_counter() - began)
        return took[1] < 0.9 * took[NEVER]

    @contextmanager
    def recorded(self, buffers: Buffers, rows: int) -> Iterator[Recorder | None]:
        """Write down the operations that the calling thread calls; None while another thread does that.

        `gated_delta` and `pack` are not written down.
        """
        if not self._recording.acquire(blocking=False):
            yield None
            return
        usual, self.recorder = self._steps, Recorder(buffers, rows, self._run)
        try:
            self._steps = {name: self.recorder.wrapped(name, function) for name, function in usual.items()}
            self._empty = self.recorder.empty
            yield self.recorder
        finally:
            self._steps, self._empty, self.recorder = usual, torch.empty, None
            self._recording.release()

    def linear(self, x: Tensor, weight: Tiled, adapters: Adapters = NO_ADAPTERS) -> Tensor:
        """Return x W^T + b [T, N] of x [T, K], with what adapters add.

        The sums of a row run over K in order: its bits depend on nothing but the row and the weights.
        """
        (rows, width), columns = x.shape, weight.columns
        out = self._empty(rows, columns, dtype=self.dtype)
        self._steps["linear"](
            x.data_ptr(), x.stride(0), rows, width, *weight.arguments, out.data_ptr(), columns, columns,
            *adapters, self.threads,
        )  # fmt: skip
        return out

    def lora(self, x: Tensor, out: Tensor, adapters: Adapters) -> None:
        """Add to out [T, N] what adapters make of x [T, K]."""
        rows, width = x.shape
        self._steps["linear"](
            x.data_ptr(), x.stride(0), rows, width, None, None, 0, None, 0, out.data_ptr(), out.stride(0),
            out.shape[1],
            *adapters, self.threads,
        )  # fmt: skip

    def tiled(self, weight: Tensor, bias: Tensor | None = None) -> Tiled | None:
        """Return a weight [N, K] and its bias for `linear`; None where K is no multiple of a unit's values."""
        rows, width = weight.shape
        if width % self.units:
            return None
        padded = pad(weight, (0, 0, 0, -rows % LANES)) if rows % LANES else weight
        tiles = padded.view(-1, LANES, width // self.units, self.units).transpose(1, 2).contiguous()
        return Tiled(tiles, bias, rows)

    def compact(self, weight: Tensor, bias: Tensor | None = None) -> Tiled | None:
        """Return the same with the very weights in 12 bits each; None where `tiled` is read as fast.

        So it is where this processor does not decode them, K is no multiple of OF_GRANULE, or the weights have
        many different upper bytes.
        """
        tiled = self.tiled(weight, bias) if self.dtype is torch.bfloat16 else None
        if tiled is None or weight.shape[1] % OF_GRANULE:
            return None
        count = tiled.num_bytes // 2
        granules = torch.empty(count * COMPACT // 8, dtype=torch.uint8)
        beside = torch.empty(4 + count // SPARSE, dtype=torch.int64)
        used = self._compact(tiled.arguments[0], count, granules.data_ptr(), beside.data_ptr(), self.threads)
        return Tiled(granules, bias, len(weight), beside[:used].clone(), COMPACT) if used else None

    def tiled_integers(self, weight: Quantized, bias: Tensor | None = None) -> Tiled | None:
        """The same of integers, which are multiplied as they are, their sums then by the scales."""
        rows, width = weight.values.shape
        if width % 4:
            return None
        values, scales = (pad(part, (0, 0, 0, -rows % LANES)) for part in (weight.values, weight.scales))
        per_unit = 4 if self.dtype is torch.bfloat16 else 1
        if per_unit > 1:
            values = values.view(torch.uint8) + (1 << (weight.bits - 1))  # modulo 256
        units = values.view(-1, LANES, width // per_unit, per_unit).transpose(1, 2)
        tiles = _nibbles(units) if weight.bits == 4 else units.contiguous()
        by_tile = scales.view(-1, LANES, scales.shape[1]).transpose(1, 2).contiguous()
        return Tiled(tiles, bias, rows, by_tile, weight.bits, weight.group)

    def tiled_blocks(self, parts: Sequence[WeightBlocks], bias: Tensor | None = None) -> Tiled | None:
        """The same of blocks, parts of a weight one behind the other; None where one ends within a tile."""
        if any(len(part.numbers) % LANES for part in parts[:-1]):
            return None
        kept, table, columns = [], [], sum(len(part.numbers) for part in parts)
        for part in parts:
            rows, width = part.numbers.shape
            scales, whole = part.shared(LANES), part.numbers.contiguous()
            numbers = torch.empty(len(scales), width * LANES * part.bits // 8, dtype=torch.uint8)
            self._pack_blocks(whole.data_ptr(), rows, width, part.bits, numbers.data_ptr(), self.threads)
            kind = part.bits | (OFFSET * (part.offsets is not None)) | (IN_PARTS * (part.parts is not None))
            places = zip(numbers, scales, strict=True)
            table += [(kind, own.data_ptr(), shared.data_ptr()) for own, shared in places]
            kept += [numbers, scales]
        return Tiled(torch.tensor(table), bias, columns, None, BLOCKS, beside=kept)

    @property
    def threads(self) -> int:
        """The number of threads that the calling thread may use."""
        return torch.get_num_threads()

    def pack(self, pieces: Table) -> None:
        """Pack the matrices of a table [pieces, PIECE_FIELDS], without holding the interpreter's lock."""
        self._pack(pieces.address, len(pieces.values))

    def attention(
        self,
        q: Tensor,
        chunks: Chunks,
        keys: Tensor,
        values: Tensor,
        group: int,
        scale: float,
        softcap: float,
        window: int,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Return what q [T, heads, d] attends to, [T, heads * d]; window 0 is all, softcap 0 is none.

        Windows below 0 stand one behind the other.

        sinks, float32 [heads], are scores of what every row sees besides, and which has no value.

        Rows of no chunk are not written.
        """
        kv_heads, num_blocks = keys.shape[:2]
        rows, heads, dim = q.shape
        out = self._empty(rows, heads * dim, dtype=q.dtype)
        self._steps["attention"](
            q.data_ptr(), q.stride(0), out.data_ptr(), chunks.table.address, len(chunks.table.values),
            keys.data_ptr(), values.data_ptr(), num_blocks, kv_heads, group, dim, scale, softcap, window,
            self.threads, None if sinks is None else sinks.data_ptr(),
        )  # fmt: skip
        return out

    def rope_write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache_rows: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Rotate q and k [T, heads, d] in place, and write k and v to the rows of the cache.

        q, k and v have one row stride; cos and sin are float32 [T, rotary], the first half of sin negated.
        """
        rows, heads, dim = q.shape
        self._steps["rope_write"](
            q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), rows, heads, k.shape[1], dim, cos.shape[1],
            cos.data_ptr(), sin.data_ptr(), cache_rows.data_ptr(), keys.data_ptr(), values.data_ptr(),
            keys.shape[1], self.threads,
        )  # fmt: skip

    def rms_norm(
        self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
    ) -> Tensor:
        """Add delta to hidden [T, width] in place; return its norm times (offset + weight [width])."""
        out = self._empty(*hidden.shape, dtype=hidden.dtype)
        rows, width = hidden.shape
        self._steps["rms_norm"](
            hidden.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), 1,
            out.data_ptr(), rows, width, width, eps, offset, self.threads,
        )  # fmt: skip
        return out

    def norm_heads(self, heads: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        """Norm the first of heads [T, heads, d] in place, as many as there are weights [weights, d]."""
        weights, width = weight.shape
        rows, place = len(heads) * weights, heads.data_ptr()
        self._steps["rms_norm"](
            place, None, weight.data_ptr(), weights, place, rows, width, heads.stride(0), eps, offset,
            self.threads,
        )  # fmt: skip

    def layer_norm(
        self, hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Add delta to hidden [T, width] in place; return its layer norm."""
        out = self._empty(*hidden.shape, dtype=hidden.dtype)
        self._steps["layer_norm"](
            hidden.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(),
            None if bias is None else bias.data_ptr(), out.data_ptr(), *hidden.shape, eps, self.threads,
        )  # fmt: skip
        return out

    def add(self, out: Tensor, x: Tensor | None, factor: float = 1.0) -> Tensor:
        """Add x, if any, to out [T, width], multiply the sum by a factor in place, and return it."""
        added = None if x is None else x.data_ptr()
        self._steps["add"](out.data_ptr(), added, *out.shape, factor, self.threads)
        return out

    def activated(self, x: Tensor, activation: Activation, *, gated: bool = False) -> Tensor:
        """Return activation(x), or activation(gate) * up [T, width] of x [T, 2 * width]."""
        rows, width = len(x), x.shape[1] // (2 if gated else 1)
        out = self._empty(rows, width, dtype=x.dtype)
        self._steps[activation](x.data_ptr(), out.data_ptr(), rows, width, gated, self.threads)
        return out

    def gated_delta(self, inputs: DeltaInputs, chunks: Table) -> Tensor:
        """Return [T, value heads * value dim] of chunks [chunks, 4] of `StateChunk`, and take their states on.

        Rows of no chunk are not written. The sums of a row run over its sequence in order: its bits do not
        depend on how the rows come in chunks.
        """
        qkv, states, weights = inputs.qkv, inputs.states, inputs.weights
        if inputs.width > MAX_CONV_WIDTH:
            raise ValueError(f"the convolution sees at most {MAX_CONV_WIDTH} rows, got {inputs.width}")
        rows = torch.empty(qkv.shape, dtype=self.dtype)
        out = torch.empty(inputs.z.shape, dtype=self.dtype)
        columns = (qkv, inputs.z, inputs.b, inputs.a)
        held = (weights.conv, weights.decay, weights.dt_bias, weights.norm, states.conv, states.recurrent)
        self._delta_rule(
            *(part for tensor in columns for part in (tensor.data_ptr(), tensor.stride(0))),
            *(tensor.data_ptr() for tensor in (*held, rows, out)),
            qkv.shape[1], inputs.width, inputs.key_heads, inputs.value_heads, inputs.key_dim, inputs.value_dim,
            weights.eps, chunks.address, len(chunks.values), self.threads,
        )  # fmt: skip
        return out

    def exchange(self, rows: Tensor, shared: int, place: tuple[int, int], sources: int, room: int) -> None:
        """Sum rows over the first processes, as many as sources, in place; all have the same bits then.

        All call it, each at its place (rank, world). The address shared is that of memory which all have, zero
        at first: a line of 64 bytes that is not zero once one has failed, which ends every exchange; a line for
        each; and twice as many places of room values as there are processes.
        """
        run = self._steps["exchange"] if rows.dtype is self.dtype else self._exchange_wide
        run(rows.data_ptr(), rows.numel(), shared, *place, sources, room)

    def draw(self, logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
        """Draw a token for each row of logits [N, vocab], as `kernels.sampling.draw_rows` does."""
        packed, masks = bytearray(), bytearray()
        for row, each in enumerate(rows):
            mask, size = -1, -(-logits.shape[1] // 16) * 2
            if each.allowed is not None:
                mask = len(masks) // size
                masks += each.allowed[:size].ljust(size, b"\0")
            filters = each.sharpness, each.top_k, each.top_p, each.span
            edits = _AS_THEY_ARE if each.edits is None else _edited(each.edits)
            packed += _DRAW.pack(row, *filters, each.seed % 2**64, each.num_generated, mask, *edits)
        ids, tops = array("q", bytes(8 * len(rows))), array("f", bytes(4 * len(rows)))
        self._draw[logits.dtype](
            logits.data_ptr(), logits.stride(0), logits.shape[1], bytes(packed), len(rows), bytes(masks),
            ids.buffer_info()[0], tops.buffer_info()[0], self.threads,
        )  # fmt: skip
        return ids.tolist(), tops.tolist()

    def scores(self, logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        """Score tokens ids [N] in rows of logits [N, vocab], as `kernels.sampling.scores` does."""
        rows, ids = len(ids), ids.long()
        own, ranks = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        tokens, values = torch.empty(rows, count, dtype=torch.int64), torch.empty(rows, count)
        self._scores[logits.dtype](
            logits.data_ptr(), logits.stride(0), logits.shape[1], rows, ids.data_ptr(), count, own.data_ptr(),
            ranks.data_ptr(), tokens.data_ptr(), values.data_ptr(), self.threads,
        )  # fmt: skip
        return ids, own, ranks, tokens, values

    def new_cache(self, kv_heads: int, num_rows: int, dim: int) -> tuple[Tensor, Tensor]:
        """Return keys [kv, blocks, d * BLOCK], and values with d padded; memory is taken when it is used."""
        blocks = num_rows // BLOCK
        padded = -(-dim // BLOCK) * BLOCK
        return self._zeros((kv_heads, blocks, dim * BLOCK)), self._zeros((kv_heads, blocks, padded * BLOCK))

    def in_order(self, keys: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [kv, positions, d] of cache blocks [kv, blocks, d * BLOCK]."""
        kv_heads, blocks = keys.shape[:2]
        units = keys.view(kv_heads, blocks, dim // self.units, BLOCK, self.units)
        pairs = values.view(kv_heads, blocks, BLOCK // self.units, -1, self.units)[:, :, :, :dim]
        return (
            units.transpose(2, 3).reshape(kv_heads, blocks * BLOCK, dim),
            pairs.transpose(3, 4).reshape(kv_heads, blocks * BLOCK, dim),
        )

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        bits = np.zeros(shape, dtype=np.int16 if self.dtype is torch.bfloat16 else np.float32)
        return torch.from_numpy(bits).view(self.dtype)


def _function(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> Any:
    return _typed(getattr(library, f"{name}_{DTYPES[dtype]}"), _SIGNATURES[name])


def _typed(function: Any, letters: str, result: Any = None) -> Any:
    function.argtypes, function.restype = [_TYPES[letter] for letter in letters], result
    return function


def _edited(edits: Edits) -> tuple[float, ...]:
    tokens, counts, added_to, added = (
        each.buffer_info()[0] for each in (edits.tokens, edits.counts, edits.added_to, edits.added)
    )
    penalties = edits.repetition, edits.presence, edits.frequency
    return 1, tokens, counts, len(edits.tokens), *penalties, added_to, added, len(edits.added)


def _nibbles(units: Tensor) -> Tensor:
    """Return int32 [tiles, K / 8, LANES] of values [tiles, K / P, LANES, P] of 4 bits, as packed.h says."""
    tiles, _, lanes, values = units.shape
    eight = units.numpy().reshape(tiles, -1, 8 // values, lanes, values)
    words = np.zeros((tiles, eight.shape[1], lanes), dtype=np.uint32)
    for unit, value in product(range(8 // values), range(values)):
        nibble = (eight[:, :, unit, :, value] & 15).astype(np.uint32)
        words |= nibble << (4 * unit + 32 // values * value)
    return torch.from_numpy(words.view(np.int32))


SLICE_FIELDS = 5
"""int64 values of a slice: rank, B, column, columns, and the vectors or 0."""
ADAPTER_FIELDS = 3 + 4 * SLICE_FIELDS
"""int64 values of an adapter in a group's table: A, rows, slices, and four slices."""
PIECE_FIELDS = 7
"""Number of int64 values of a packed matrix: where it lies, its strides, rows and columns, 1 for B or 0 for A,
and where it goes: A [rows, K] as rows that are padded to whole lane vectors of 16 units, B [rank, out] as [out
/ 16, rank / values of a unit, 16, values of a unit], padded with zeros.
"""
