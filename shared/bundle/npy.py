"""The two npy files of a bundle, byte for byte as ``np.save`` writes them.

Weights are ``(1, R, C)``: one row per (module, layer), right-padded with zeros to C elements. The config is
int32 ``(1, R, 4)``, or ``(1, R, 3)`` from converters older than DoRA.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from shared.bundle.manifest import FileDigest
from shared.deployment import Dtype
from shared.faults import BundleCorrupt

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

NUMPY_TYPES: Final[dict[Dtype, np.dtype[Any]]] = {
    Dtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    Dtype.FLOAT16: np.dtype("<f2"),
    Dtype.FLOAT32: np.dtype("<f4"),
}
# npy has no word for bfloat16: its raw bits are stored as 2-byte voids.
DESCR: Final[dict[Dtype, str]] = {Dtype.BFLOAT16: "|V2", Dtype.FLOAT16: "<f2", Dtype.FLOAT32: "<f4"}
CONFIG_DESCR: Final = "<i4"

# What np.save writes for a C-ordered array, and nothing else: magic, version, header length, a dict literal.
_HEADER = re.compile(
    rb"\{'descr': '([|<][Vfi][0-9]+)', 'fortran_order': False, 'shape': \(([0-9]+(?:, [0-9]+)*),?\), \} *\n"
)
_MAX_HEADER = 4096


@dataclass(frozen=True)
class Header:
    """The head of an npy file."""

    descr: str
    shape: tuple[int, ...]
    offset: int
    """Bytes before the first element."""


def header_bytes(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return the header that ``np.save`` writes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def cast(values: Array, dtype: Dtype, scale: float = 1.0) -> Array:
    """Return ``scale * values`` in a storage type: the product in float32, one rounding to nearest even.

    Values beyond the type's range become infinite, without a warning.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        wide = values.astype(np.float32)
        if scale != 1.0:
            wide *= np.float32(scale)
        return wide.astype(NUMPY_TYPES[dtype])


def write_weights(
    path: Path, dtype: Dtype, *, count: int, width: int, rows: Iterable[tuple[Array, Array]]
) -> FileDigest:
    """Write the weights file from (A, scaled B) pairs in the storage type; one row is held at a time.

    Raises:
        ValueError: a row is wider than width, has another type, or there are not ``count`` of them.
    """
    kind = NUMPY_TYPES[dtype]
    written = 0
    with path.open("wb") as file:
        sink = _Sink(file)
        sink.write(header_bytes(DESCR[dtype], (1, count, width)))
        for a, b in rows:
            length = a.size + b.size
            if length > width or a.dtype != kind or b.dtype != kind:
                raise ValueError(f"row {written}: {length} elements of {a.dtype} for {width} of {kind}")
            sink.write(a.tobytes())
            sink.write(b.tobytes())
            sink.write(bytes((width - length) * kind.itemsize))
            written += 1
    if written != count:
        raise ValueError(f"{written} rows for a header that says {count}")
    return sink.digest()


def write_config(path: Path, rows: Array) -> FileDigest:
    """Write the config file from ``(R, 4)`` integers: module id, layer, rank, is_dora."""
    with path.open("wb") as file:
        sink = _Sink(file)
        sink.write(header_bytes(CONFIG_DESCR, (1, *rows.shape)))
        sink.write(rows.astype(CONFIG_DESCR).tobytes())
    return sink.digest()


def read_weights(data: bytes | Path, dtype: Dtype, what: str) -> Array:
    """Return the weights as ``(R, C)`` in the storage type; a path is mapped, not read.

    Raises:
        BundleCorrupt: the header or the size is not that of such a file.
    """
    array = _read(data, DESCR[dtype], what)
    return array.view(NUMPY_TYPES[dtype])


def read_config(data: bytes | Path, what: str) -> Array:
    """Return the config as ``(R, 3 or 4)`` int32.

    Raises:
        BundleCorrupt: the header or the size is not that of such a file.
    """
    return _read(data, CONFIG_DESCR, what)


class _Sink:
    """A file that is hashed while it is written."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def digest(self) -> FileDigest:
        return FileDigest(size=self._size, sha256=self._hash.hexdigest())


def _read(data: bytes | Path, descr: str, what: str) -> Array:
    if isinstance(data, Path):
        with data.open("rb") as file:
            head = file.read(_MAX_HEADER)
        size = data.stat().st_size
    else:
        head, size = data[:_MAX_HEADER], len(data)
    header = parse_header(head, what)
    if header.descr != descr or len(header.shape) != 3 or header.shape[0] != 1 or 0 in header.shape:
        raise BundleCorrupt(
            f"{what}: expected type {descr} and shape (1, rows, columns) without zeros, "
            f"found {header.descr} and {header.shape}"
        )
    kind = np.dtype(descr)
    expected = header.offset + kind.itemsize * header.shape[1] * header.shape[2]
    if size != expected:
        raise BundleCorrupt(f"{what}: expected {expected} bytes for shape {header.shape}, found {size}")
    flat: Array
    if isinstance(data, Path):
        flat = np.memmap(data, dtype=kind, mode="r", offset=header.offset)
    else:
        flat = np.frombuffer(data, dtype=kind, offset=header.offset)
    return flat.reshape(header.shape[1:])


def parse_header(head: bytes, what: str) -> Header:
    """Return the header that the first bytes of an npy file hold.

    Raises:
        BundleCorrupt: it is not exactly what ``np.save`` writes in version 1 or 2.
    """
    version = head[6:7]
    width = {b"\x01": 2, b"\x02": 4}.get(version)
    if not head.startswith(b"\x93NUMPY") or width is None or head[7:8] != b"\x00":
        raise BundleCorrupt(f"{what}: expected an npy file of version 1.0 or 2.0, found {head[:8]!r}")
    start = 8 + width
    length = int.from_bytes(head[8:start], "little")
    text = head[start : start + length]
    match = _HEADER.fullmatch(text)
    if len(text) != length or match is None:
        raise BundleCorrupt(f"{what}: expected a header as np.save writes it, found {text[:80]!r}")
    shape = tuple(int(size) for size in match[2].split(b", "))
    return Header(match[1].decode(), shape, start + length)
