"""The rows that a bundle will have, and what each is made from."""

from __future__ import annotations

from dataclasses import dataclass

from builder_service.domain.value_rules import Part
from builder_service.domain.vectors import VectorRow, Vectors
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import ModuleRow
from loramux_shared.bundle.npy import Array


@dataclass(frozen=True)
class PlannedRow:
    """A row of a bundle and the tensors that it is made from."""

    row: ModuleRow
    a: str
    b: str
    b_rows: tuple[int, int]
    """The rows of b that are this module's, from the first up to the second: all, unless it is fused."""
    vectors: tuple[Array, ...] = ()
    """Vectors behind B, in the storage type."""


def planned_rows(parts: list[Part], vectors: Vectors, base: ModelConfig) -> tuple[PlannedRow, ...]:
    """Return a row for each part, with its vectors, and for vectors alone."""
    left = dict(vectors.rows)
    rows = [_planned(part, left.pop((part.pair.key.layer, part.module.id), None)) for part in parts]
    rows += [_planned_vectors(row, base) for row in left.values()]
    return tuple(sorted(rows, key=lambda planned: planned.row.place))


def _planned_vectors(own: VectorRow, base: ModelConfig) -> PlannedRow:
    inside, out = base.features(own.module.name, own.key.layer) or (0, 0)
    row = ModuleRow(
        layer=own.key.layer,
        module_id=own.module.id,
        module=own.module.name,
        rank=0,
        in_features=inside,
        out_features=out,
        scale=1.0,
        norm_a=0.0,
        norm_b=0.0,
        norm_ba=0.0,
        vectors=len(own.vectors),
    )
    return PlannedRow(row, "", "", (0, 0), own.vectors)


def _planned(part: Part, own: VectorRow | None) -> PlannedRow:
    a, b = part.pair.a, part.pair.b
    vectors = () if own is None else own.vectors
    row = ModuleRow(
        layer=part.pair.key.layer,
        module_id=part.module.id,
        module=part.module.name,
        rank=a.shape[0],
        in_features=a.shape[1],
        out_features=part.b_rows[1] - part.b_rows[0],
        scale=part.scale,
        norm_a=part.norms.a,
        norm_b=part.norms.b,
        norm_ba=part.norms.ba,
        expert=part.pair.key.expert,
        vectors=len(vectors),
    )
    return PlannedRow(row, a.name, b.name, part.b_rows, vectors)
