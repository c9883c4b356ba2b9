"""Bundles out of a store: nothing is used before it was verified."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from loramux_shared.bundle.manifest import (
    ALL_TEXTS,
    CONFIG_FILE,
    MANIFEST_FILE,
    OWN_TOKENS_FILE,
    REBUILD,
    SCORE_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    FileDigest,
    Manifest,
    ModuleRow,
    ScoreHead,
    bundle_key,
    verify,
    version_of,
)
from loramux_shared.bundle.modules import BY_ID, NO_LAYER, OF_EXPERTS, OF_NO_LAYER
from loramux_shared.bundle.npy import NUMPY_TYPES, Array, Bytes, read_config, read_weights
from loramux_shared.deployment import Dtype
from loramux_shared.faults import BundleCorrupt
from loramux_shared.storage.base import ObjectMissing, Store
from loramux_shared.untrusted_json import excerpt

LONGEST_SHOWN: Final = 400
"""Characters of a value in a message."""


@dataclass(frozen=True)
class BundleRow:
    """One module of one layer; A and B are views in the storage type."""

    row: ModuleRow
    a: Array
    """(rank, in_features)"""
    b: Array
    """(out_features, rank), scaled by alpha/r already."""
    vectors: Array
    """(vectors, out_features), as `ModuleRow.vectors` says."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; its rows share one buffer."""

    digest: str
    manifest: Manifest
    table: Array
    """(rows of layers, elements): A, B and vectors of each row, one after the other, then zeros."""
    vocabulary: Array | None = None
    """(elements,): A and B of each row of no layer, then rows that replace the base's."""
    score: Array | None = None
    """(labels, hidden size), float32: the score head of an adapter that classifies texts."""
    texts: Mapping[str, bytes] = field(default_factory=dict)
    """Texts that the adapter brings beside its weights, by the names of `ALL_TEXTS`."""

    @property
    def rows(self) -> tuple[BundleRow, ...]:
        """Views of the arrays, in the order of the manifest."""
        return (*map(_row, self.manifest.layer_rows, self.table), *self._of_no_layer())

    def _of_no_layer(self) -> Iterator[BundleRow]:
        if (rest := self.vocabulary) is None:
            return
        for row in self.manifest.vocabulary_rows:
            yield _row(row, rest)
            rest = rest[row.elements :]


def read_manifest(store: Store, digest: str) -> Manifest:
    """Return a bundle's manifest; raise BundleCorrupt for none or another digest, and StoreUnavailable."""
    return parse_manifest(read_file(store, digest, MANIFEST_FILE), digest)


def parse_manifest(data: bytes, digest: str) -> Manifest:
    """Return the manifest of a bundle from its bytes; raise BundleCorrupt for another digest."""
    return Manifest.from_bytes(data, sha256=digest, what=_what(digest, MANIFEST_FILE))


def read_bundle(store: Store, digest: str) -> Bundle:
    """Return a bundle, every byte of it verified; raise BundleCorrupt where a file is missing or not what the
    manifest says, and StoreUnavailable.
    """
    manifest = read_manifest(store, digest)
    files = {}
    for name in files_of(manifest, digest):
        data = read_file(store, digest, name, manifest.files[name].size)
        verify_file(data, manifest.files, name, digest)
        files[name] = data
    return assemble(digest, manifest, files)


def files_of(manifest: Manifest, digest: str) -> tuple[str, ...]:
    """Return the files of a bundle beside its manifest; raise BundleCorrupt where one is missing or unknown."""
    if unknown := sorted(manifest.files.keys() - {*manifest.npy_files, *ALL_TEXTS}):
        raise BundleCorrupt(f"{_what(digest, MANIFEST_FILE)}: expected no file {excerpt(unknown[0])!r}")
    for name in manifest.npy_files:
        _expected(manifest.files, name, digest)
    return *manifest.npy_files, *texts_of(manifest)


def texts_of(manifest: Manifest) -> tuple[str, ...]:
    """Return those of `ALL_TEXTS` that a bundle has."""
    return tuple(name for name in ALL_TEXTS if name in manifest.files)


def assemble(digest: str, manifest: Manifest, files: Mapping[str, Bytes], *, checked: bool = False) -> Bundle:
    """Return a bundle of its files, each of which was verified; its arrays are views of them.

    checked: a bundle of this digest was assembled before, so that what its files say of each other is known.
    Raise BundleCorrupt where shapes, config rows or padding differ from what the manifest says.
    """
    what = _what(digest)
    if not checked:
        _check_manifest(manifest, what)
    table = np.empty((0, 0), NUMPY_TYPES[manifest.dtype])
    if WEIGHTS_FILE in manifest.npy_files:
        table = _layers(manifest, files, what, checked=checked)
    vocabulary = _vocabulary(manifest, files, what) if VOCABULARY_FILE in manifest.npy_files else None
    score = None if manifest.score is None else read_score(manifest.score, files[SCORE_FILE], digest)
    texts = {name: bytes(files[name]) for name in texts_of(manifest)}
    return Bundle(digest, manifest, table, vocabulary, score, texts)


def read_score(head: ScoreHead, data: Bytes, digest: str) -> Array:
    """Return the weights of a score head, in its shape, of a verified file; raise BundleCorrupt for others."""
    what = _what(digest, SCORE_FILE)
    values = read_weights(data, Dtype.FLOAT32, what)
    _expect(values.shape, head.shape, f"{what}: shape")
    return values


def _layers(manifest: Manifest, files: Mapping[str, Bytes], what: str, *, checked: bool) -> Array:
    table = read_weights(files[WEIGHTS_FILE], manifest.dtype, f"{what}: {WEIGHTS_FILE}")
    columns, rows = read_config(files[CONFIG_FILE], f"{what}: {CONFIG_FILE}"), manifest.layer_rows
    _expect(table.shape, (len(rows), manifest.row_width), f"{what}: shape of {WEIGHTS_FILE}")
    _expect(columns.shape, (len(rows), manifest.config_columns), f"{what}: shape of {CONFIG_FILE}")
    if not checked:
        _check_rows(rows, table, columns, what)
    return table


def _vocabulary(manifest: Manifest, files: Mapping[str, Bytes], what: str) -> Array:
    values = read_weights(files[VOCABULARY_FILE], manifest.dtype, f"{what}: {VOCABULARY_FILE}")
    elements = sum(row.elements for row in manifest.vocabulary_rows)
    elements += sum(part.elements for part in manifest.replaced)
    _expect(values.shape, (1, elements), f"{what}: shape of {VOCABULARY_FILE}")
    return values.reshape(-1)


def verify_file(data: Bytes, files: Mapping[str, FileDigest], name: str, digest: str) -> None:
    """Raise `BundleCorrupt` unless a file has the size and the digest that the manifest names."""
    expected = _expected(files, name, digest)
    if len(data) != expected.size:
        raise BundleCorrupt(
            f"{_what(digest, name)}: expected {expected.size} bytes, found {len(data)}. {REBUILD}"
        )
    verify(data, expected.sha256, _what(digest, name))


def _expected(files: Mapping[str, FileDigest], name: str, digest: str) -> FileDigest:
    expected = files.get(name)
    if expected is None:
        raise BundleCorrupt(f"{_what(digest, MANIFEST_FILE)}: expected a digest of {name}, found none")
    return expected


def _check_manifest(manifest: Manifest, what: str) -> None:
    """Raise BundleCorrupt where parts of a manifest contradict each other."""
    _check_places(manifest, what)
    for index, row in enumerate(manifest.rows):
        _check_row(row, f"{what}: row {index}")
    _check_columns(manifest, what)
    _check_replaced(manifest, what)
    _check_labels(manifest, what)
    _check_own_tokens(manifest, what)
    _expect(bool(manifest.row_width), bool(manifest.layer_rows), f"{what}: row_width is not 0")
    version = version_of(manifest.parts, manifest.invocation_tokens, manifest.files)
    _expect(manifest.format_version, version, f"{what}: format_version")
    _check_coverage(manifest, what)
    _check_zero_warning(manifest, what)


def _check_places(manifest: Manifest, what: str) -> None:
    places = [row.place for row in manifest.rows]
    if places != sorted(set(places)):
        raise BundleCorrupt(f"{what}: expected rows sorted by (layer, module, expert), each once")


def _check_row(row: ModuleRow, what: str) -> None:
    """Check that a row has the module, the expert and the layer that belong together, and some content."""
    module = BY_ID.get(row.module_id)
    _expect(row.module, module.name if module else "a module that is served", f"{what}: module")
    _expect(row.expert is not None, row.module_id in OF_EXPERTS, f"{what}: says an expert")
    _expect(row.layer == NO_LAYER, row.module_id in OF_NO_LAYER, f"{what}: is of no layer")
    if row.vectors and (row.expert is not None or row.layer == NO_LAYER):
        raise BundleCorrupt(f"{what}: expected no vectors of {row.module}, found {row.vectors}")
    if not row.rank and not row.vectors:
        raise BundleCorrupt(f"{what}: expected a rank or vectors, found neither")


def _check_columns(manifest: Manifest, what: str) -> None:
    mixed = any(row.expert is not None for row in manifest.rows)
    _expect(manifest.config_columns == 5, mixed, f"{what}: config_columns is 5")
    if manifest.config_columns == 3 and any(row.vectors for row in manifest.rows):
        raise BundleCorrupt(f"{what}: expected 4 columns, which say which rows have vectors, found 3")


def _check_labels(manifest: Manifest, what: str) -> None:
    head = manifest.score
    if head and head.id2label and len(head.id2label) != head.num_labels:
        raise BundleCorrupt(f"{what}: expected a name for each label, found {len(head.id2label)}. {REBUILD}")


def _check_own_tokens(manifest: Manifest, what: str) -> None:
    if manifest.vocab is not None and OWN_TOKENS_FILE not in manifest.files:
        raise BundleCorrupt(
            f"{what}: expected {OWN_TOKENS_FILE} for an adapter with its own vocabulary, found none"
        )


def _check_coverage(manifest: Manifest, what: str) -> None:
    used, redundant = manifest.coverage.used, manifest.coverage.redundant
    if list(used + redundant) != [*sorted(set(used) - set(redundant)), *sorted(set(redundant))]:
        raise BundleCorrupt(f"{what}: expected sorted tensor keys without duplicates")


def _check_zero_warning(manifest: Manifest, what: str) -> None:
    """Check that a manifest warns of an adapter that changes nothing, and of no other."""
    warns = any(warning.code == "W_ZERO_B" for warning in manifest.warnings)
    changes = manifest.replaced or manifest.score or any(row.norm_ba or row.vectors for row in manifest.rows)
    _expect(warns, not changes, f"{what}: warning W_ZERO_B")


def _check_replaced(manifest: Manifest, what: str) -> None:
    """Check which rows are replaced: of each module once, and of each token once."""
    ids = [part.module_id for part in manifest.replaced]
    if ids != sorted(set(ids)) or not OF_NO_LAYER.issuperset(ids):
        raise BundleCorrupt(f"{what}: expected replaced rows of embeddings and head, each once. {REBUILD}")
    for part in manifest.replaced:
        _expect(part.module, BY_ID[part.module_id].name, f"{what}: replaced: module")
        end = 0
        for index, (first, count) in enumerate(part.tokens):
            if count < 1 or first < end + (index > 0):
                raise BundleCorrupt(f"{what}: {part.module}: expected ascending runs of tokens. {REBUILD}")
            end = first + count
        _expect(end > 0, True, f"{what}: {part.module}: replaces rows")


def _check_rows(rows: Sequence[ModuleRow], table: Array, columns: Array, what: str) -> None:
    """Check each row of both files: quickly where all is well, since a load waits for it."""
    expected = [row.columns(columns.shape[1]) for row in rows]
    if (found := columns.tolist()) != expected:
        for index, pair in enumerate(zip(found, expected, strict=True)):
            _expect(*pair, f"{what}: row {index}: config")
    values, size = table.view(np.uint8), table.itemsize
    for index, row in enumerate(rows):
        length = row.elements
        if length > table.shape[1]:
            raise BundleCorrupt(
                f"{what}: row {index}: expected {excerpt(str(length))} elements, found {table.shape[1]}"
            )
        if np.count_nonzero(values[index, length * size :]):
            raise BundleCorrupt(
                f"{what}: row {index}: expected zeros after element {length}, found something else"
            )


def _row(row: ModuleRow, values: Array) -> BundleRow:
    split, length = row.rank * row.in_features, row.rank * (row.in_features + row.out_features)
    a = values[:split].reshape(row.rank, row.in_features)
    b = values[split:length].reshape(row.out_features, row.rank)
    return BundleRow(row, a, b, values[length : row.elements].reshape(row.vectors, row.out_features))


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        texts = [excerpt(str(each), LONGEST_SHOWN) for each in (expected, found)]
        raise BundleCorrupt(f"{what}: expected {texts[0]}, found {texts[1]}. {REBUILD}")


def read_file(store: Store, digest: str, name: str, size: int | None = None) -> bytes:
    """Return a file of a bundle as it is in the store: nothing is verified but that it has at most size bytes.

    Raises:
        BundleCorrupt: it is missing.
        RecordTooLarge: it has more, or is a manifest that exceeds its bound.
        StoreUnavailable: the store does not answer.
    """
    try:
        return store.get(bundle_key(digest, name), size)
    except ObjectMissing as missing:
        raise BundleCorrupt(
            f"{_what(digest, name)}: expected an object, found none in {store.uri}. {REBUILD}"
        ) from missing


def _what(digest: str, name: str = "") -> str:
    return f"bundle {digest[:12]}{name and ': '}{name}"
