"""The rows of a manifest."""

from __future__ import annotations

import pytest

from loramux_shared.bundle.manifest import Manifest, ModuleRow
from loramux_shared.deployment import Dtype

IN, OUT = 6, 10


def row(layer: int, rank: int, vectors: int = 0) -> ModuleRow:
    """A row of one module."""
    norms = {"norm_a": 1.0, "norm_b": 1.0, "norm_ba": 1.0}
    sizes = {"rank": rank, "in_features": IN, "out_features": OUT, "vectors": vectors}
    return ModuleRow(layer=layer, module_id=1, module="attn_q", scale=1.0, **norms, **sizes)


@pytest.mark.parametrize(
    ("rows", "tensors", "bytes_"),
    [
        ((row(0, 4),), 2, 2 * 4 * (IN + OUT)),
        ((row(0, 4), row(1, 2, vectors=2)), 6, 2 * (4 + 2) * (IN + OUT) + 2 * OUT * 4),
        ((row(0, 0, vectors=3),), 5, 2 * OUT * 4),
    ],
    ids=["pairs", "with vectors", "vectors alone"],
)
def test_tensors_and_bytes_of_rows(rows: tuple[ModuleRow, ...], tensors: int, bytes_: int) -> None:
    """A and B in the storage type, and c and d in float32, whatever a third vector repairs of c."""
    manifest = Manifest(dtype=Dtype.BFLOAT16, rows=rows, row_width=64, files={}, inputs={})
    assert (manifest.tensors_used, manifest.weights_bytes) == (tensors, bytes_)
