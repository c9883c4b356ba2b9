"""Safetensors files, read without trusting a byte of their headers; an adapter's weights may be in several.

Format: 8 bytes, little endian, length of the header; a JSON object of name -> dtype, shape, offsets into the
data that follows; the data, without gaps. PEFT writes one file of weights; what saves adapters as transformers
saves models writes several, and an index that says which tensor is where.
"""

import math
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from loramux_shared.adapter_files import INDEX, WEIGHTS
from loramux_shared.bundle.npy import Array
from loramux_shared.untrusted_json import (
    MAX_SHARD_TENSORS,
    JsonInvalid,
    excerpt,
    of_tensors,
    parse_strict_json,
)

MAX_HEADER_BYTES: Final = 16 << 20
"""Largest header; a shard of a hundred thousand tensors has about half of it."""
MAX_DIMS: Final = 8
MAX_SIZE: Final = 1 << 48
"""Largest dimension and offset."""
DTYPE_SIZES: Final = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
READABLE: Final = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""The types that adapters may have."""


class HeaderInvalid(Exception):
    """A file that is not a safetensors file; the text says what is wrong."""


class TooManyTensors(HeaderInvalid):
    """A file with more tensors than it may have."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    size: int
    """Bytes."""
    trained: int | None = None
    """Rank that the config names, of an A that is made from others; 0 where they do not show it.

    None: the rank of A itself.
    """


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was read."""

    path: Path
    tensors: dict[str, Tensor]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """Return a tensor of a readable type, or some of its rows: from the first, up to the second."""
        tensor = self.tensors[name]
        start, stop = _span(tensor, rows)
        shape = tensor.shape if rows is None else (rows[1] - rows[0], *tensor.shape[1:])
        return self._elements(tensor, start, stop - start).reshape(shape)

    def pieces(self, name: str, elements: int, rows: tuple[int, int] | None = None) -> Iterator[Array]:
        """Yield what `read` returns as flat pieces of at most so many elements."""
        tensor = self.tensors[name]
        begin, stop = _span(tensor, rows)
        for start in range(begin, stop, elements):
            yield self._elements(tensor, start, min(elements, stop - start))

    def origins(self, name: str) -> tuple[str, ...]:
        """Return the names in the file of the tensors that one is made from: its own."""
        return (name,)

    def detach(self) -> None:
        """Remove the file's name; it stays on the disk as long as this is there."""
        _ = self._descriptor
        self.path.unlink()

    def _elements(self, tensor: Tensor, start: int, count: int) -> Array:
        kind = READABLE[tensor.dtype]
        values: Array = np.empty(count, kind)
        rest = memoryview(values.view(np.uint8).data)
        offset = tensor.offset + start * kind.itemsize
        while rest:
            size = os.preadv(self._descriptor, [rest], offset)
            if not size:
                raise HeaderInvalid(f"{tensor.name}: the file was truncated while it was read")
            rest, offset = rest[size:], offset + size
        return values

    @cached_property
    def _descriptor(self) -> int:
        """Return the descriptor of the open file.

        To open it for each tensor would take longer than to read small ones.
        """
        descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def _span(tensor: Tensor, rows: tuple[int, int] | None) -> tuple[int, int]:
    """Return the first element of some rows, and the one after the last."""
    if rows is None:
        return 0, math.prod(tensor.shape)
    width = math.prod(tensor.shape[1:])
    return rows[0] * width, rows[1] * width


def read_header(path: Path, max_tensors: int = MAX_SHARD_TENSORS) -> TensorFile:
    """Read the header of a file.

    Raises:
        TooManyTensors: which is seen before they are read.
        HeaderInvalid: the header is cut off, too long or no such JSON; or sizes, offsets and shapes differ.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise HeaderInvalid(f"header of {length} bytes in a file of {size} (at most {MAX_HEADER_BYTES})")
        text = file.read(length)
    if (count := text.count(b'"data_offsets"')) > max_tensors:
        raise TooManyTensors(str(count))
    if not text.startswith(b"{"):
        raise HeaderInvalid(f"the header begins with byte {text[0]:#04x}, not with an object")
    try:
        entries = parse_strict_json(text, of_tensors(max_tensors))
    except JsonInvalid as error:
        raise HeaderInvalid(f"the header is not JSON: {error}") from error
    _check_metadata(entries.pop("__metadata__", None))
    if len(entries) > max_tensors:  # whatever their keys are spelled like
        raise TooManyTensors(str(len(entries)))
    tensors = [_tensor(name, entry, 8 + length) for name, entry in entries.items()]
    _without_gaps(tensors, 8 + length, size)
    return TensorFile(path, {tensor.name: tensor for tensor in tensors})


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise HeaderInvalid("__metadata__ is not an object of strings")


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    label = excerpt(name, 200)
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3:
            pass
        case _:
            raise HeaderInvalid(f"{label}: expected dtype, shape and data_offsets, and nothing else")
    sizes = (*shape, begin, end)
    if len(shape) > MAX_DIMS or not all(type(value) is int and 0 <= value <= MAX_SIZE for value in sizes):
        raise HeaderInvalid(f"{label}: expected sizes and offsets, found something else")
    if dtype not in DTYPE_SIZES:
        raise HeaderInvalid(f"{label}: unknown dtype {dtype[:20]!r}")
    expected = math.prod(shape) * DTYPE_SIZES[dtype]
    if end - begin != expected:
        raise HeaderInvalid(f"{label}: expected {expected} bytes for {dtype} {shape}, found {end - begin}")
    return Tensor(name, dtype, tuple(shape), start + begin, expected)


def _without_gaps(tensors: list[Tensor], start: int, size: int) -> None:
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != start:
            label = excerpt(tensor.name, 200)
            raise HeaderInvalid(f"{label}: expected to begin at byte {start}, found {tensor.offset}")
        start += tensor.size
    if start != size:
        raise HeaderInvalid(f"expected a file of {start} bytes, found {size}")


MAX_INDEX_BYTES: Final = 16 << 20
"""Largest index: ten times the size of one with as many tensors as an adapter may have."""


@dataclass(frozen=True)
class Sharded(TensorFile):
    """Several files as one."""

    shards: Mapping[str, TensorFile]
    """Files by the names of the tensors."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """Return a tensor, or some of its rows."""
        return self.shards[name].read(name, rows)

    def pieces(self, name: str, elements: int, rows: tuple[int, int] | None = None) -> Iterator[Array]:
        """Yield what `read` returns as flat pieces of at most so many elements."""
        return self.shards[name].pieces(name, elements, rows)


def read_weights(folder: Path, max_tensors: int) -> TensorFile:
    """Read the headers of an adapter's weights.

    Raises:
        TooManyTensors: which is seen before they are read.
        HeaderInvalid: a file is not a safetensors file, or the index says something else than the files.
    """
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS, max_tensors)
    index = _index(folder / INDEX, max_tensors)
    if len(index) > max_tensors:
        raise TooManyTensors(str(len(index)))
    found: dict[str, TensorFile] = {}
    for path in sorted(folder.glob("adapter_model-*.safetensors")):
        shard = read_header(path, max_tensors)
        for name in shard.tensors:
            if name in found or index.get(name) != path.name:
                raise HeaderInvalid(
                    f"{INDEX}: {name[:200]!r} is in {path.name}, but the index names another file"
                )
            found[name] = shard
    if missing := sorted(index.keys() - found.keys()):
        raise HeaderInvalid(f"{INDEX}: {missing[0][:200]!r} is in none of the files")
    return Sharded(folder / INDEX, {name: shard.tensors[name] for name, shard in found.items()}, found)


def _index(path: Path, max_tensors: int) -> dict[str, str]:
    if (size := path.stat().st_size) > MAX_INDEX_BYTES:
        raise HeaderInvalid(f"{INDEX}: {size} bytes, at most {MAX_INDEX_BYTES}")
    try:
        table = parse_strict_json(path.read_bytes(), of_tensors(max_tensors))
    except JsonInvalid as error:
        raise HeaderInvalid(f"{INDEX}: not valid JSON: {error}") from error
    files = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise HeaderInvalid(f"{INDEX}: expected an object with a weight_map of names")
    return files
