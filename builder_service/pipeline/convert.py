"""Convert: an adapter's tensors as the two npy files and the manifest of a bundle, in the work folder."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Final, Literal

import numpy as np

from builder_service.domain.own_rows import PlannedRows
from builder_service.domain.planned import PlannedRow
from builder_service.domain.rules.checked import CheckedAdapter
from builder_service.domain.score_heads import PlannedScore
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import ValidAdapter
from loramux_shared.adapter_files import weight_files
from loramux_shared.bundle.manifest import (
    CONFIG_FILE,
    OWN_TOKENS_FILE,
    SCORE_FILE,
    TEXT_FILES,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    FileDigest,
    Manifest,
    ModuleRow,
    sha256_hex,
    version_of,
)
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.bundle.npy import NUMPY_TYPES, Array, cast, config_pieces, weights_pieces, write_checked
from loramux_shared.bundle.proof import Proof
from loramux_shared.deployment import Dtype
from loramux_shared.faults import InternalFault

PIECE_ELEMENTS: Final = 1 << 18
"""Elements that are converted at once; what fits a core's cache."""
FOLDER: Final = "bundle"
"""Folder of the files that are written: an adapter's own can have the same names."""


@dataclass(frozen=True)
class BuiltBundle:
    """A bundle in the work folder, read back and found right."""

    name: str
    manifest: Manifest
    paths: Mapping[str, Path] = field(default_factory=dict)
    """The files by their names in the store, in the order in which they are put there."""

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The manifest as it is stored."""
        return self.manifest.to_bytes()

    @cached_property
    def digest(self) -> str:
        """The bundle's name in the store."""
        return sha256_hex(self.manifest_bytes)


def convert_adapter(
    adapter: ValidAdapter, dtype: Dtype, progress: Progress, proof: Proof | None = None
) -> BuiltBundle:
    """Write a bundle; those of the adapter's own files that are not part of it are removed after it."""
    fetched, checked = adapter.fetched, adapter.checked
    rows = tuple(planned.row for planned in checked.rows)
    replaced = tuple(planned.replaced for planned in checked.replaced)
    (fetched.folder / FOLDER).mkdir()
    texts = [name for name in TEXT_FILES if name in fetched.files]
    progress.enter(fetched.name, Stage.CONVERTING, sum(file.size for file in fetched.files.values()))
    paths, files = {}, {}
    for name, pieces in _contents(checked, dtype, progress.counter(fetched.name)).items():
        paths[name] = fetched.folder / FOLDER / name
        files[name] = _written(paths[name], pieces, fetched.name)
    manifest = Manifest(
        format_version=version_of((*rows, *replaced), checked.invocation_tokens, files),
        dtype=dtype,
        rows=rows,
        replaced=replaced,
        vocab=checked.vocab,
        score=None if checked.score is None else checked.score.head,
        encodes=checked.encodes,
        row_width=_width(rows),
        config_columns=columns_of(checked),
        files=files | {name: fetched.files[name] for name in texts},
        inputs={name: fetched.files[name] for name in weight_files(fetched.files)},
        coverage=checked.coverage,
        invocation_tokens=checked.invocation_tokens,
        base_model_name=checked.base_model_name,
        base_model_revision=checked.base_model_revision,
        warnings=checked.findings,
        proof=proof,
    )
    bundle = BuiltBundle(fetched.name, manifest, paths | {name: fetched.folder / name for name in texts})
    for path in fetched.folder.iterdir():
        if path.is_file() and path.name not in texts:
            path.unlink()
    return bundle


def bundle_bytes(checked: CheckedAdapter, dtype: Dtype) -> int:
    """Return the size of a bundle's npy files, headers aside."""
    rows = [planned.row for planned in checked.rows]
    of_layers = [row for row in rows if row.layer != NO_LAYER]
    others = [row.elements for row in rows if row.layer == NO_LAYER]
    others += [planned.replaced.elements for planned in checked.replaced]
    elements = len(of_layers) * _width(rows) + sum(others)
    head = checked.score.head if checked.score else None
    score = math.prod(head.shape) * Dtype.FLOAT32.itemsize if head else 0
    return score + elements * NUMPY_TYPES[dtype].itemsize + 4 * columns_of(checked) * len(of_layers)


def columns_of(checked: CheckedAdapter) -> Literal[4, 5]:
    """Return the columns of the config file: one more where a row is of an expert's module."""
    return 4 if all(planned.row.expert is None for planned in checked.rows) else 5


def _width(rows: Iterable[ModuleRow]) -> int:
    return max((row.elements for row in rows if row.layer != NO_LAYER), default=0)


def _contents(
    checked: CheckedAdapter, dtype: Dtype, count: Callable[[int], None]
) -> dict[str, Iterator[bytes | int]]:
    """Return the files that are made, by their names, each as the pieces that it is written from."""
    found = {
        **_layer_files(checked, dtype, count),
        **_vocabulary_file(checked, dtype, count),
        **_score_file(checked, count),
    }
    if checked.own_tokens is not None:
        found[OWN_TOKENS_FILE] = iter([checked.own_tokens.to_bytes()])
    return found


def _layer_files(
    checked: CheckedAdapter, dtype: Dtype, count: Callable[[int], None]
) -> dict[str, Iterator[bytes | int]]:
    """Return the two files of the rows of layers; none without such rows."""
    planned_rows = [planned for planned in checked.rows if planned.row.layer != NO_LAYER]
    if not planned_rows:
        return {}
    columns, width = columns_of(checked), _width(planned.row for planned in planned_rows)
    table = np.array([planned.row.columns(columns) for planned in planned_rows], np.int32)
    rows = (_row(planned, checked, dtype, count) for planned in planned_rows)
    return {
        WEIGHTS_FILE: weights_pieces(dtype, count=len(planned_rows), width=width, rows=rows),
        CONFIG_FILE: config_pieces(table),
    }


def _vocabulary_file(
    checked: CheckedAdapter, dtype: Dtype, count: Callable[[int], None]
) -> dict[str, Iterator[bytes | int]]:
    """Return the file of rows outside the layers and of replaced rows; none without any."""
    planned_rows = [planned for planned in checked.rows if planned.row.layer == NO_LAYER]
    if not planned_rows and not checked.replaced:
        return {}
    elements = sum(planned.row.elements for planned in planned_rows)
    elements += sum(planned.replaced.elements for planned in checked.replaced)
    values = [_row(planned, checked, dtype, count) for planned in planned_rows]
    values += [_replaced(planned, dtype, count) for planned in checked.replaced]
    rows = [chain.from_iterable(values)]
    return {VOCABULARY_FILE: weights_pieces(dtype, count=1, width=elements, rows=rows)}


def _score_file(checked: CheckedAdapter, count: Callable[[int], None]) -> dict[str, Iterator[bytes | int]]:
    """Return the file of the score head; none without a head."""
    if (score := checked.score) is None:
        return {}
    height, width = score.head.shape
    rows = (_score(score, row, count) for row in range(height))
    return {SCORE_FILE: weights_pieces(Dtype.FLOAT32, count=height, width=width, rows=rows)}


def _row(
    planned: PlannedRow, checked: CheckedAdapter, dtype: Dtype, count: Callable[[int], None]
) -> Iterator[Array]:
    """Yield A, then scaled B, in the storage type, never the whole of either in memory; then vectors."""
    if checked.file is None:
        raise InternalFault(f"{planned.a}: no file to read it from")
    if planned.row.rank:
        for values in checked.file.pieces(planned.a, PIECE_ELEMENTS):
            yield cast(values, dtype)
            count(values.nbytes)
        for values in checked.file.pieces(planned.b, PIECE_ELEMENTS, planned.b_rows):
            yield cast(values, dtype, planned.row.scale)
            count(values.nbytes)
    yield from planned.vectors


def _replaced(planned: PlannedRows, dtype: Dtype, count: Callable[[int], None]) -> Iterator[Array]:
    """Yield the rows that replace the base's, in the storage type."""
    for rows in planned.rows:
        for values in planned.file.pieces(planned.tensor, PIECE_ELEMENTS, rows):
            yield cast(values, dtype)
            count(values.nbytes)


def _score(planned: PlannedScore, row: int, count: Callable[[int], None]) -> Iterator[Array]:
    """Yield the weights of a row, which float32 holds as they are."""
    for values in planned.file.pieces(planned.tensor, PIECE_ELEMENTS, (row, row + 1)):
        yield cast(values, Dtype.FLOAT32)
        count(values.nbytes)


def _written(path: Path, pieces: Iterator[bytes | int], name: str) -> FileDigest:
    """Write a file, read it back, and return what it is; raise InternalFault where the two differ."""
    digest = write_checked(path, pieces)
    if digest is None:
        raise InternalFault(f"adapter {name!r}: {path.name} was not written as planned")
    return digest
