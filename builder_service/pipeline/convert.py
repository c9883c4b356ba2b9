"""Convert: an adapter's tensors as the two npy files and the manifest of a bundle, in the work folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from builder_service.domain.file_rules import weight_files
from builder_service.domain.rules import CheckedAdapter, PlannedRow
from builder_service.pipeline.progress import Progress, Stage
from builder_service.pipeline.validate import ValidAdapter
from shared.bundle.manifest import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE, Manifest, sha256_hex
from shared.bundle.npy import Array, cast, write_config, write_weights
from shared.bundle.proof import Proof
from shared.bundle.reader import decode
from shared.deployment import Dtype
from shared.faults import InternalFault
from shared.sources.files import hash_file

CONFIG_COLUMNS: Final = 4
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

    @property
    def digest(self) -> str:
        """The bundle's name in the store."""
        return sha256_hex(self.manifest.to_bytes())


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
    progress.enter(fetched.name, Stage.CONVERTING, 2 * sum(file.size for file in fetched.files.values()))
    files = {
        WEIGHTS_FILE: write_weights(
            weights,
            dtype,
            count=len(rows),
            width=width,
            rows=_counted(checked, dtype, progress, fetched.name),
        ),
        CONFIG_FILE: write_config(
            config, np.array([[row.module_id, row.layer, row.rank, 0] for row in rows], np.int32)
        ),
    }
    manifest = Manifest(
        dtype=dtype,
        rows=tuple(rows),
        row_width=width,
        config_columns=CONFIG_COLUMNS,
        files=files | {name: fetched.files[name] for name in texts},
        inputs={name: fetched.files[name] for name in weight_files(fetched.files)},
        coverage=checked.coverage,
        base_model_name=checked.base_model_name,
        base_model_revision=checked.base_model_revision,
        warnings=checked.findings,
        proof=proof,
    )
    bundle = BuiltBundle(
        fetched.name, manifest, weights, config, {name: fetched.folder / name for name in texts}
    )
    _check(bundle, checked, progress)
    for path in fetched.folder.iterdir():
        if path.is_file() and path.name not in texts:
            path.unlink()
    return bundle


def _matrices(planned: PlannedRow, checked: CheckedAdapter, dtype: Dtype) -> tuple[Array, Array]:
    """Return A and scaled B in the storage type."""
    if checked.file is None:
        raise InternalFault(f"{planned.a}: no file to read it from")
    a = cast(checked.file.read(planned.a), dtype)
    return a, cast(checked.file.read(planned.b, planned.b_rows), dtype, planned.row.scale)


def _counted(
    checked: CheckedAdapter, dtype: Dtype, progress: Progress, name: str
) -> Iterator[tuple[Array, Array]]:
    for planned in checked.rows:
        a, b = _matrices(planned, checked, dtype)
        yield a, b
        progress.advance(name, a.nbytes + b.nbytes)


def _check(bundle: BuiltBundle, checked: CheckedAdapter, progress: Progress) -> None:
    """Read the files back as a replica will, and compare every row with its source.

    Raises:
        InternalFault: they differ; a disk or this program is broken.
    """
    manifest = bundle.manifest
    for path in (bundle.weights, bundle.config):
        if hash_file(path) != manifest.files[path.name]:
            raise InternalFault(f"adapter {bundle.name!r}: {path.name} was not written as it was meant")
    decoded = decode(manifest, bundle.weights, bundle.config, f"adapter {bundle.name!r}")
    for row, planned in zip(decoded, checked.rows, strict=True):
        a, b = _matrices(planned, checked, manifest.dtype)
        if row.a.tobytes() != a.tobytes() or row.b.tobytes() != b.tobytes():
            raise InternalFault(f"adapter {bundle.name!r}: {planned.a} was not written as it was meant")
        progress.advance(bundle.name, a.nbytes + b.nbytes)
