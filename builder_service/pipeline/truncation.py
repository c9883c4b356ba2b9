"""Rows of an adapter as their best approximations of a lower rank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from builder_service.domain.low_rank import LowRank, best_approximation
from builder_service.domain.planned import PlannedRow
from builder_service.domain.rules.checked import CheckedAdapter
from builder_service.domain.rules.values import row_norms
from builder_service.domain.safetensors_header import Tensor, TensorFile
from loramux_shared.bundle.manifest import Truncation
from loramux_shared.bundle.npy import Array, cast
from loramux_shared.deployment import Dtype
from loramux_shared.faults import Finding

SCRATCH: Final = "truncated.bin"
"""A and B of the approximations in float32, one after the other."""


def truncate_adapter(
    checked: CheckedAdapter, rank: int, dtype: Dtype, folder: Path, progress: Callable[[int], None]
) -> CheckedAdapter:
    """Return a checked adapter whose rows have at most that rank; new matrices go to the folder."""
    source = checked.file
    if source is None or all(planned.row.rank <= rank for planned in checked.rows):
        return checked
    scratch = _Scratch(folder / SCRATCH)
    rows = []
    for planned in checked.rows:
        if not planned.row.rank:
            rows.append(planned)
            continue
        a, b = source.read(planned.a), source.read(planned.b, planned.b_rows)
        if planned.row.rank > rank:
            low = best_approximation(a, b, planned.row.scale, rank)
            rows.append(scratch.add_row(planned, low, dtype))
        else:  # a copy in the same file: a bundle is made from one file
            rows.append(scratch.add_copy(planned, a, b))
        progress(0)
    return replace(
        checked, file=scratch.close(), rows=tuple(rows), findings=(*checked.findings, _warning(rows, rank))
    )


def _warning(rows: list[PlannedRow], rank: int) -> Finding:
    cut = [row for planned in rows if (row := planned.row).truncation is not None]
    worst = max(cut, key=lambda row: row.truncation.error if row.truncation else 0.0)
    ranks = ", ".join(map(str, sorted({row.truncation.rank for row in cut if row.truncation})))
    error = worst.truncation.error if worst.truncation else 0.0
    return Finding(
        code="W_TRUNCATED",
        where=f"{len(cut)} of {len(rows)} rows",
        expected=f"rank <= {rank}, as truncate_to_rank wishes",
        found=f"rank {ranks}; worst relative error {error:.2e} at layer {worst.layer} {worst.module}",
        fix="Set max_lora_rank instead to serve it as it is.",
    )


class _Scratch:
    """A file of matrices that are read back by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._tensors: dict[str, Tensor] = {}

    def add_row(self, planned: PlannedRow, low: LowRank, dtype: Dtype) -> PlannedRow:
        """Add an approximation; its norms are those of what will be stored."""
        norms = row_norms(cast(low.a, dtype), cast(low.b, dtype))
        row = planned.row.model_copy(
            update={
                "rank": low.a.shape[0],
                "scale": 1.0,
                "norm_a": norms.a,
                "norm_b": norms.b,
                "norm_ba": norms.ba,
                "truncation": Truncation(rank=planned.row.rank, error=float(f"{low.error:.4e}")),
            }
        )
        return self.add_copy(replace(planned, row=row), low.a, low.b)

    def add_copy(self, planned: PlannedRow, a: Array, b: Array) -> PlannedRow:
        """Add A and B of a row."""
        name = ".".join(map(str, planned.row.place))
        self._add(f"{name}.A", a)
        self._add(f"{name}.B", b)
        return replace(planned, a=f"{name}.A", b=f"{name}.B", b_rows=(0, b.shape[0]))

    def close(self) -> TensorFile:
        """Return the file."""
        self._file.close()
        return TensorFile(self._path, self._tensors)

    def _add(self, name: str, values: Array) -> None:
        kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        offset = self._file.tell()
        self._file.write(values.tobytes())
        self._tensors[name] = Tensor(name, kinds[values.dtype.name], values.shape, offset, values.nbytes)
