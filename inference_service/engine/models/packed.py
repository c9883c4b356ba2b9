"""A weight of few bits as its file keeps it: its tensors, checked as they are taken, and its widening."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from inference_service.engine.kernels.blocks import WeightBlocks, cut
from loramux_shared.bases.weight_format import Quantization, WeightScheme
from loramux_shared.faults import CheckpointInvalid

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
WHOLE: Final = (torch.int32, torch.int64)


class PackedWeights(Protocol):
    """The weights of few bits among the tensors of a checkpoint."""

    def __contains__(self, name: str) -> bool:
        """Return True if a weight is one of them."""
        ...

    def parts(self, name: str) -> Mapping[str, str]:
        """Return the names of the tensors that a weight is made of, by their roles. Raise CheckpointInvalid
        where one stands beside it that is not read.
        """
        ...

    def open(self, pieces: Pieces) -> Packed:
        """Return a weight; raise CheckpointInvalid where its tensors do not go together."""
        ...


@dataclass(frozen=True)
class Pieces:
    """The tensors of a weight in a file."""

    name: str
    """The weight's, as a decoder asks for it."""
    shape: tuple[int, ...]
    """Shape that config.json implies."""
    quantization: Quantization
    tensors: Mapping[str, Tensor]
    """Tensors by their roles: ``weight``, ``weight_scale``, ``qzeros`` ..."""

    def maybe(self, role: str) -> Tensor | None:
        """Return one that may be missing."""
        return self.tensors.get(role)

    def take(self, role: str, types: Collection[torch.dtype], *shapes: tuple[int, ...]) -> Tensor:
        """Return a tensor of one of these types, and of one of these shapes if any are given; raise
        CheckpointInvalid where there is none, or another one.
        """
        tensor = self.maybe(role)
        if tensor is None:
            raise self.invalid(role, "expected the tensor, found none. Is the download complete?")
        if tensor.dtype not in types:
            names = ", ".join(named(each) for each in types)
            raise self.invalid(role, f"expected {names}, found {named(tensor.dtype)}.")
        if shapes and tuple(tensor.shape) not in shapes:
            expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
            raise self.invalid(role, f"expected shape {expected}, found {tuple(tensor.shape)}.")
        return tensor

    def groups_of_rows(self, role: str, rows: int) -> Tensor:
        """Return scales [rows, groups] in float32, of a file that has them [groups, rows]; raise
        CheckpointInvalid where there are none, or others.
        """
        scales = self.take(role, FLOATS)
        groups = scales.shape[0] if scales.dim() else 0
        return self.take(role, FLOATS, (groups, rows)).float().t()

    def matrix(self) -> tuple[int, int]:
        """Return the rows and columns of a weight; raise CheckpointInvalid where the config implies others."""
        if len(self.shape) != 2:
            raise self.invalid("weight", f"expected a matrix, config.json implies shape {self.shape}.")
        return self.shape[0], self.shape[1]

    def scheme(
        self, numbers: str, grid: Sequence[int], rows: int, columns: int, zero_points: bool | None = None
    ) -> WeightScheme:
        """Return the scheme of the config that has such a grid of scales, down and across.

        zero_points says whether there are some, where that is seen in the tensors. Raise CheckpointInvalid
        where no scheme of the config has.
        """
        known = [
            scheme
            for scheme in self.quantization.schemes
            if scheme.numbers == numbers and zero_points in (None, scheme.zero_points)
        ]
        for scheme in known:
            if scheme.grid(rows, columns) == tuple(grid):
                return scheme
        expected = " or ".join(str(list(scheme.grid(rows, columns))) for scheme in known) or "no such weight"
        with_zeros = "" if zero_points is None else f" {'with' if zero_points else 'without'} zero points"
        raise self.invalid(
            "weight",
            f"quantization_config implies scales {expected} for {numbers}{with_zeros} of shape "
            f"{[rows, columns]}, found {list(grid)}.",
        )

    def invalid(self, role: str, what: str) -> CheckpointInvalid:
        """Return what is raised about one of the tensors."""
        return CheckpointInvalid(f"{self.name} ({self.quantization.label}): {role}: {what}")


def named(dtype: torch.dtype) -> str:
    """Return the name of a type, for people."""
    return str(dtype).removeprefix("torch.")


CHUNK: Final = 1 << 18
"""Numbers that are widened at once: what comes between takes a megabyte each, and stays near the processor."""
HALVES: Final = 32
"""Numbers of 4 bits of a row that products take together, and that must share a scale."""
ROWS: Final = 8
"""Chunks are of multiples of it, so that none begins within a word."""


class Packed(Protocol):
    """A weight of few bits: matrices, most often one, of rows by columns."""

    pieces: Pieces
    """The tensors themselves, for operations that take them unwidened."""
    scheme: WeightScheme
    matrices: int
    rows: int
    columns: int
    turned: bool
    """True if a decoder needs the matrices as columns by rows."""

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows of a matrix in float32; begin is a multiple of `ROWS`."""
        ...


class PackedLayout(NamedTuple):
    """The tensors that a weight of few bits consists of, by the ends of their names."""

    marks: tuple[str, ...]
    """Tensors of which each shows such a weight."""
    open: Callable[[Pieces], Packed]
    """Raises CheckpointInvalid where the tensors do not go together."""
    others: frozenset[str]
    """Its other tensors."""


def widened(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Return the weight in a type, in the shape that is asked for: exact in float32, and rounded once.

    In memory it is as the file keeps it, turned or not. Raise CheckpointInvalid for values that are no numbers,
    or none of the type.
    """
    shape, limit = packed.pieces.shape, torch.finfo(dtype).max
    out = torch.empty(packed.matrices, packed.rows, packed.columns, dtype=dtype)
    step = max(ROWS, CHUNK // max(1, packed.columns) // ROWS * ROWS)
    for matrix, view in enumerate(out):
        for begin in range(0, packed.rows, step):
            end = min(begin + step, packed.rows)
            part = packed.part(matrix, begin, end)
            low, high = map(float, part.aminmax())
            if not (-limit <= low and high <= limit):  # written so that NaN fails too
                raise packed.pieces.invalid(
                    "weight", f"expected finite numbers of {named(dtype)}, found {low} to {high}."
                )
            view[begin:end] = part
    return (out.transpose(1, 2) if packed.turned else out).view(shape)


@dataclass(frozen=True)
class Shared:
    """The part that a matrix's numbers share: a scale, and a zero point where there are some."""

    of: WeightScheme
    scales: Tensor
    """[down, across]"""
    zeros: Tensor | None = None
    """[down, across]"""
    group_of: Tensor | None = None
    """The group of each column, where groups are not of columns that follow each other."""

    def apply(self, part: Tensor, begin: int) -> Tensor:
        """Return rows from begin on [n, columns], less their zero points and times their scales, in place."""
        if self.zeros is not None:
            numbers, zeros = self._over(part, self.zeros, begin)
            numbers.sub_(zeros)
        numbers, scales = self._over(part, self.scales, begin)
        numbers.mul_(scales)
        return part

    def _over(self, part: Tensor, grid: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """Return rows and what they share, in shapes that go together."""
        rows, columns = part.shape
        if len(grid) > 1:
            grid = grid[torch.arange(begin, begin + rows) // (self.of.rows or 1)]
        if self.group_of is not None:
            return part, grid.index_select(1, self.group_of)
        width = min(self.of.columns or columns, columns)
        if grid.shape[1] * width == columns:
            return part.view(rows, -1, width), grid[:, :, None]
        return part, grid.repeat_interleave(width, dim=1)[:, :columns]


class Keepable(ABC):
    """A weight that products may take as it is."""

    @abstractmethod
    def kept(self) -> Kept | None:
        """Return the weight as products take it, None where they take it widened; raise CheckpointInvalid for
        scales that are no numbers.
        """


class Grouped(Keepable):
    """A weight of one matrix, whose integers share scales, and zero points where there are some."""

    turned, matrices = False, 1
    lowest = 0
    """The least number of 4 bits."""
    rows: int
    columns: int
    scheme: WeightScheme
    pieces: Pieces
    shared: Shared

    @abstractmethod
    def numbers(self, begin: int, end: int) -> Tensor:
        """Return the integers of rows in float32."""

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows in float32."""
        del matrix
        return self.shared.apply(self.numbers(begin, end), begin)

    def kept(self) -> Integers | None:
        """Return the integers of 4 bits, as products take them; None where groups are others than theirs."""
        shared, (down, across) = self.shared, self.shared.scales.shape
        width = self.columns // across
        whole = down == self.rows and width * across == self.columns and width % HALVES == 0
        if self.scheme.numbers != "int4" or shared.group_of is not None or not whole:
            return None
        if not bool(shared.scales.isfinite().all()):
            raise self.pieces.invalid("scales", "expected finite numbers.")
        least = self.lowest + 8
        zeros = None if shared.zeros is None else (shared.zeros - least).to(torch.int8).contiguous()
        if zeros is None and self.lowest == 0:
            zeros = torch.full((down, across), -8, dtype=torch.int8)
        numbers = (self.numbers(0, self.rows) - least).to(torch.int8)
        return Integers(numbers, shared.scales.float().contiguous(), zeros)


class Integers(NamedTuple):
    """A weight that is (number - zero point) * scale."""

    numbers: Tensor
    """int8 [rows, columns], from -8 to 7."""
    scales: Tensor
    """float32 [rows, groups]."""
    zeros: Tensor | None
    """int8, as the scales."""

    def to(self, device: torch.device) -> Integers:
        """Return the same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Integers(self.numbers.to(device), self.scales.to(device), zeros)

    def part(self, rows: Tensor, columns: slice | None = None) -> Integers:
        """Return some rows and columns; raise ValueError for columns that end within a group."""
        return Integers(*cut(self, rows, columns))


Kept = Integers | WeightBlocks
"""A weight of few bits that is multiplied as it is kept."""


def grids(pieces: Pieces, scales: Tensor) -> Tensor:
    """Return scales, or zero points, of a weight's matrices as [matrices, down, across]; raise
    CheckpointInvalid where they are no grid for each matrix.
    """
    *matrices, rows, _ = pieces.shape
    count, shape = math.prod(matrices), list(scales.shape)
    if scales.numel() == 1:
        return scales.reshape(1, 1, 1).expand(count, 1, 1)
    if shape in (matrices, [*matrices, rows]):
        return scales.reshape(count, -1, 1)
    if len(shape) == len(matrices) + 2 and shape[:-2] == matrices:
        return scales.reshape(count, *shape[-2:])
    raise pieces.invalid("scales", f"expected a grid of scales for {pieces.shape}, found shape {shape}.")


def has_zeros(zeros: Tensor | None) -> bool | None:
    """Return whether there are zero points; None where all are 0, as they may stand beside a weight without."""
    if zeros is None:
        return False
    return True if bool(zeros.any()) else None
