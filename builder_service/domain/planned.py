"""The rows that a bundle will have, and what each is made from; an adapter that changes nothing has zeros."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from builder_service.domain.derived import Derived, Product
from builder_service.domain.rules.values import Part
from builder_service.domain.safetensors_header import Tensor, TensorFile
from builder_service.domain.vectors import AdapterVectors, VectorRow
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import ModuleRow
from loramux_shared.bundle.modules import BY_NAME, Module
from loramux_shared.bundle.npy import Array
from loramux_shared.faults import Finding


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


def planned_rows(parts: list[Part], vectors: AdapterVectors, base: ModelConfig) -> tuple[PlannedRow, ...]:
    """Return a row for each part, with its vectors, and for vectors alone."""
    left = dict(vectors.rows)
    rows = [_planned(part, left.pop((part.pair.key.layer, part.module.id), None)) for part in parts]
    rows += [_planned_vectors(row, base) for row in left.values()]
    return tuple(sorted(rows, key=lambda planned: planned.row.place))


def _planned_vectors(own: VectorRow, base: ModelConfig) -> PlannedRow:
    features = base.features(own.module.name, own.key.layer) or (0, 0)
    row = _row_of_nothing(own.module, own.key.layer, 0, features, len(own.vectors))
    return PlannedRow(row, "", "", (0, 0), own.vectors)


def _row_of_nothing(
    module: Module, layer: int, rank: int, features: tuple[int, int], vectors: int = 0
) -> ModuleRow:
    """Return the row of a module that has no A and B, or has zeros."""
    return ModuleRow(
        layer=layer,
        module_id=module.id,
        module=module.name,
        rank=rank,
        in_features=features[0],
        out_features=features[1],
        scale=1.0,
        norm_a=0.0,
        norm_b=0.0,
        norm_ba=0.0,
        vectors=vectors,
    )


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


_NAMES: Final = ("zeros.lora_A", "zeros.lora_B")
"""Names of tensors that are made; no key of an adapter is so called."""


def unchanged(file: TensorFile, base: ModelConfig) -> tuple[TensorFile, PlannedRow]:
    """Return a file with A and B of zeros, and their row: a bundle has at least one."""
    module = base.layer_groups[0][0].modules[0]
    inside, out = base.features(module, 0) or (1, 1)
    tensors, recipes = dict(file.tensors), {}
    for name, shape in zip(_NAMES, ((1, inside), (out, 1)), strict=True):
        size = 4 * shape[0] * shape[1]
        tensors[name] = Tensor(name, "F32", shape, 0, size)
        recipes[name] = _zeros(shape)
    row = _row_of_nothing(BY_NAME[module], 0, 1, (inside, out))
    return Derived(file.path, tensors, file, recipes), PlannedRow(row, *_NAMES, (0, out))


def _zeros(shape: tuple[int, int]) -> Product:
    return Product((), lambda: np.zeros(shape, np.float32))


def unchanged_warning() -> Finding:
    """Say that answers are the base's."""
    found = "every scale and bias is one that changes nothing, and every matrix is the base's own"
    return Finding(code="W_ZERO_B", found=found, fix="The adapter changes nothing: untrained?")
