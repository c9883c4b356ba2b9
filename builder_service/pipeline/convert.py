"""Convert: an adapter's tensors as the two npy files and the manifest of a bundle, in the work folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np

from builder_service.domain.file_rules import weight_files
from builder_service.domain.rules import CheckedAdapter, PlannedRow
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import ValidAdapter
from loramux_shared.bundle.manifest import (
    CONFIG_FILE,
    TEXT_FILES,
    WEIGHTS_FILE,
    FileDigest,
    Manifest,
    sha256_hex,
    version_of,
)
from loramux_shared.bundle.npy import (
    NUMPY_TYPES,
    Array,
    cast,
    config_pieces,
    weights_pieces,
    write_checked,
)
from loramux_shared.bundle.proof import Proof
from loramux_shared.deployment import Dtype
from loramux_shared.faults import InternalFault

PIECE: Final = 1 << 18
"""Elements that are converted at once; what fits a core's cache."""
FOLDER: Final = "bundle"
"""Of the files that are written: an adapter's own can have the same names."""


@dataclass(frozen=True)
class BuiltBundle:
    """A bundle in the work folder, read back and found right."""

    name: str
    manifest: Manifest
    weights: Path
    config: Path
    texts: Mapping[str, Path] = field(default_factory=dict)
    """By name; the adapter's own."""

    @property
    def paths(self) -> dict[str, Path]:
        """The files by their names in the store, in the order in which they are put there."""
        return {WEIGHTS_FILE: self.weights, CONFIG_FILE: self.config, **self.texts}

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
    rows = [planned.row for planned in checked.rows]
    width = max(row.rank * (row.in_features + row.out_features) for row in rows)
    (fetched.folder / FOLDER).mkdir()
    weights, config = fetched.folder / FOLDER / WEIGHTS_FILE, fetched.folder / FOLDER / CONFIG_FILE
    texts = [name for name in TEXT_FILES if name in fetched.files]
    progress.enter(fetched.name, Stage.CONVERTING, sum(file.size for file in fetched.files.values()))
    columns = columns_of(checked)
    table = np.array([row.columns(columns) for row in rows], np.int32)

    counted = _rows(checked, dtype, progress.counter(fetched.name))
    content = weights_pieces(dtype, count=len(rows), width=width, rows=counted)
    files = {
        WEIGHTS_FILE: _written(weights, content, fetched.name),
        CONFIG_FILE: _written(config, config_pieces(table), fetched.name),
    }
    manifest = Manifest(
        format_version=version_of(rows, checked.invocation_tokens),
        dtype=dtype,
        rows=tuple(rows),
        row_width=width,
        config_columns=columns,
        files=files | {name: fetched.files[name] for name in texts},
        inputs={name: fetched.files[name] for name in weight_files(fetched.files)},
        coverage=checked.coverage,
        invocation_tokens=checked.invocation_tokens,
        base_model_name=checked.base_model_name,
        base_model_revision=checked.base_model_revision,
        warnings=checked.findings,
        proof=proof,
    )
    bundle = BuiltBundle(
        fetched.name, manifest, weights, config, {name: fetched.folder / name for name in texts}
    )
    for path in fetched.folder.iterdir():
        if path.is_file() and path.name not in texts:
            path.unlink()
    return bundle


def bundle_bytes(checked: CheckedAdapter, dtype: Dtype) -> int:
    """Return the size of a bundle's npy files, headers aside."""
    rows = [planned.row for planned in checked.rows]
    width = max((row.rank * (row.in_features + row.out_features) for row in rows), default=0)
    return len(rows) * (width * NUMPY_TYPES[dtype].itemsize + 4 * columns_of(checked))


def columns_of(checked: CheckedAdapter) -> Literal[4, 5]:
    """Return the columns of the config file: one more where a row is of an expert's module."""
    return 4 if all(planned.row.expert is None for planned in checked.rows) else 5


def _rows(checked: CheckedAdapter, dtype: Dtype, count: Callable[[int], None]) -> Iterator[Iterator[Array]]:
    for planned in checked.rows:
        yield _row(planned, checked, dtype, count)


def _row(
    planned: PlannedRow, checked: CheckedAdapter, dtype: Dtype, count: Callable[[int], None]
) -> Iterator[Array]:
    """Yield A, then scaled B, in the storage type; never the whole of either is in memory."""
    if checked.file is None:
        raise InternalFault(f"{planned.a}: no file to read it from")
    for values in checked.file.pieces(planned.a, PIECE):
        yield cast(values, dtype)
        count(values.nbytes)
    for values in checked.file.pieces(planned.b, PIECE, planned.b_rows):
        yield cast(values, dtype, planned.row.scale)
        count(values.nbytes)


def _written(path: Path, pieces: Iterator[bytes | int], name: str) -> FileDigest:
    """Write a file, read it back, compare, and return what it is.

    Raises:
        InternalFault: they differ; a disk or this program is broken.
    """
    digest = write_checked(path, pieces)
    if digest is None:
        raise InternalFault(f"adapter {name!r}: {path.name} was not written as it was meant")
    return digest
