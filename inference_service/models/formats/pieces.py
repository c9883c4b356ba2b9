"""The tensors that make up one weight, checked as they are taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from loramux_shared.bases.formats import Numbers, Quantization, WeightScheme
from loramux_shared.faults import CheckpointInvalid

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
WHOLE: Final = (torch.int32, torch.int64)


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
        """Return a tensor of one of these types, and of one of these shapes if any are given.

        Raises:
            CheckpointInvalid: it is missing or another one.
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
        """Return scales [rows, groups] in float32, of a file that has them [groups, rows].

        Raises:
            CheckpointInvalid: there are none, or others.
        """
        scales = self.take(role, FLOATS)
        groups = scales.shape[0] if scales.dim() else 0
        return self.take(role, FLOATS, (groups, rows)).float().t()

    def matrix(self) -> tuple[int, int]:
        """Return the rows and columns of a weight that must be one matrix.

        Raises:
            CheckpointInvalid: config.json implies another one.
        """
        if len(self.shape) != 2:
            raise self.invalid("weight", f"expected a matrix, config.json implies shape {self.shape}.")
        return self.shape[0], self.shape[1]

    def scheme(
        self, numbers: Numbers, grid: Sequence[int], rows: int, columns: int, zero_points: bool | None = None
    ) -> WeightScheme:
        """Return the scheme of the config that has such a grid of scales, down and across.

        zero_points says whether there are some, where that is seen in the tensors.

        Raises:
            CheckpointInvalid: no scheme of the config has.
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
