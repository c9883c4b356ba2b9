"""The two npy files of a bundle, byte for byte as ``np.save`` writes them.

Weights are ``(1, R, C)``: one row per (module, layer), right-padded with zeros to C elements. The config is
int32 ``(1, R, 4)``, or ``(1, R, 3)`` from converters older than DoRA.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.deployment import Dtype
from loramux_shared.faults import BundleCorrupt

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Bytes: TypeAlias = bytes | bytearray | memoryview
"""Memory, byte by byte; arrays over it can be written where it can."""

NUMPY_TYPES: Final[dict[Dtype, np.dtype[Any]]] = {
    Dtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    Dtype.FLOAT16: np.dtype("<f2"),
    Dtype.FLOAT32: np.dtype("<f4"),
}
# npy has no word for bfloat16: its raw bits are stored as 2-byte voids.
DESCR: Final[dict[Dtype, str]] = {Dtype.BFLOAT16: "|V2", Dtype.FLOAT16: "<f2", Dtype.FLOAT32: "<f4"}
CONFIG_DESCR: Final = "<i4"

# The header of np.save for a C-ordered array: magic, version, header length, a dict literal.
_HEADER = re.compile(
    rb"\{'descr': '([|<][Vfi][0-9]+)', 'fortran_order': False, 'shape': \(([0-9]+(?:, [0-9]+)*),?\), \} *\n"
)
_MAX_HEADER = 4096
_ZEROS: Final = bytes(1 << 18)


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

    Values beyond the type's range become infinite, without a warning. What has the type already, and no
    scale, is returned as it is.
    """
    if scale == 1.0 and values.dtype == NUMPY_TYPES[dtype]:
        return values
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        wide = values.astype(np.float32)
        if scale != 1.0:
            wide *= np.float32(scale)
        return wide.astype(NUMPY_TYPES[dtype])


def weights_pieces(
    dtype: Dtype, *, count: int, width: int, rows: Iterable[Iterable[Array]]
) -> Iterator[bytes | int]:
    """Yield the weights file from rows: A, scaled B and vectors in the storage type, in pieces of any size.

    Bytes are content, a number is so many zeros. Raise ValueError for a row that is wider than width or has
    another type, or for another number than ``count``.
    """
    kind = NUMPY_TYPES[dtype]
    yield header_bytes(DESCR[dtype], (1, count, width))
    done = 0
    for row in rows:
        length = 0
        for piece in row:
            length += piece.size
            if length > width or piece.dtype != kind:
                raise ValueError(f"row {done}: {length} elements of {piece.dtype} for {width} of {kind}")
            yield piece.tobytes()
        yield (width - length) * kind.itemsize
        done += 1
    if done != count:
        raise ValueError(f"{done} rows for a header that says {count}")


def config_pieces(rows: Array) -> Iterator[bytes | int]:
    """Yield the config file: module id, layer, rank, vectors, and the expert where some are of experts."""
    yield header_bytes(CONFIG_DESCR, (1, *rows.shape))
    yield rows.astype(CONFIG_DESCR).tobytes()


def write_checked(path: Path, pieces: Iterable[bytes | int]) -> FileDigest | None:
    """Write a file, read each piece back, and return what the file is; None when it is not what was meant.

    Zeros take no space where the file system has sparse files. The digest is that of what was read.
    """
    digest, size, right = hashlib.sha256(), 0, True
    with path.open("w+b", buffering=0) as file:
        for piece in pieces:
            if isinstance(piece, int):
                file.truncate(size + piece)
            else:
                _write_at(file.fileno(), piece, size)
            for expected in _bounded([piece]):
                found = os.pread(file.fileno(), len(expected), size)
                right &= found == expected
                digest.update(found)
                size += len(found)
        right &= os.fstat(file.fileno()).st_size == size
    return FileDigest(size=size, sha256=digest.hexdigest()) if right else None


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _bounded(pieces: Iterable[bytes | int]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, int):
            for start in range(0, piece, len(_ZEROS)):
                yield _ZEROS[: piece - start]
        else:
            yield piece


def read_weights(data: Bytes, dtype: Dtype, what: str) -> Array:
    """Return the weights as ``(R, C)`` in the storage type; raise BundleCorrupt for another header or size."""
    array = _read(data, DESCR[dtype], what)
    return array.view(NUMPY_TYPES[dtype])


def read_config(data: Bytes, what: str) -> Array:
    """Return the config as ``(R, 3 to 5)`` int32; raise BundleCorrupt for another header or size."""
    return _read(data, CONFIG_DESCR, what)


def _read(data: Bytes, descr: str, what: str) -> Array:
    header = parse_header(bytes(data[:_MAX_HEADER]), what)
    if header.descr != descr or len(header.shape) != 3 or header.shape[0] != 1 or 0 in header.shape:
        raise BundleCorrupt(
            f"{what}: expected type {descr} and shape (1, rows, columns) without zeros, "
            f"found {header.descr} and {header.shape}"
        )
    kind = np.dtype(descr)
    expected = header.offset + kind.itemsize * header.shape[1] * header.shape[2]
    if len(data) != expected:
        raise BundleCorrupt(f"{what}: expected {expected} bytes for shape {header.shape}, found {len(data)}")
    return np.frombuffer(data, dtype=kind, offset=header.offset).reshape(header.shape[1:])


def parse_header(head: bytes, what: str) -> Header:
    """Return the header that the first bytes of an npy file hold; raise BundleCorrupt unless it is exactly what
    ``np.save`` writes in version 1 or 2.
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
