"""One file of a checkpoint, read from the first byte to the last into private memory.

A mapped file would be the source's own for as long as the model is served: a write to it would change answers,
and a truncation would end the process with SIGBUS.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from loramux_shared.bundle.manifest import FileDigest
from loramux_shared.untrusted_json import MAX_SHARD_TENSORS, excerpt, of_tensors, parse_strict_json

TYPES: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""Types that are read, by safetensors' names: those of weights, and of the tensors of weights of few bits."""
OTHERS: Final = {"I16": "int16", "F64": "float64"}
"""Names that people know of some that are not."""
MAX_HEADER: Final = 100 << 20
MAX_DIMS: Final = 8
MAX_ELEMENTS: Final = 1 << 48
"""Most elements of a tensor, sizes of 0 taken for 1: torch multiplies them in 64 bits."""
PIECE: Final = 1 << 20


class ShardInvalid(Exception):
    """The file is not a safetensors file; the message says why."""


@dataclass(frozen=True)
class Shard:
    """The content of a file."""

    tensors: dict[str, Tensor]
    others: dict[str, str]
    """Types of the tensors that are of none of `TYPES`, and were not kept."""
    digest: FileDigest
    """Digest of all bytes that were read."""


def read_shard(path: Path) -> Shard:
    """Read a file; raise ShardInvalid where its header does not describe it, and OSError if unreadable."""
    tensors, others = {}, {}
    with path.open("rb", buffering=0) as file:
        reader = ShardReader(file)
        for name, (dtype, shape, size) in _header(reader, os.fstat(file.fileno()).st_size).items():
            if dtype not in TYPES:
                others[name] = OTHERS.get(dtype, excerpt(dtype))
                reader.skip(size)
                continue
            if math.prod(shape) * TYPES[dtype].itemsize != size:
                raise ShardInvalid(
                    f"{excerpt(name, 200)} has {size} bytes, which is not what shape {shape} takes"
                )
            data = torch.empty(size, dtype=torch.uint8)
            reader.fill(memoryview(data.numpy().data))
            tensors[name] = data.view(TYPES[dtype]).view(shape)
        return Shard(tensors, others, reader.rest())


class ShardReader:
    """Reads a file from front to back, and hashes what it reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0
        """Bytes that were read."""

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as there is room for, in pieces that stay in the processor's cache."""
        while view:
            count = self._file.readinto(view[:PIECE])  # type: ignore[attr-defined]  # a raw file has it
            if not count:
                raise ShardInvalid(f"it ends after {self.size} bytes")
            self._sha256.update(view[:count])
            self.size += count
            view = view[count:]

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        data = bytearray(count)
        self.fill(memoryview(data))
        return bytes(data)

    def skip(self, count: int) -> None:
        """Pass over bytes."""
        piece = memoryview(bytearray(min(count, PIECE)))
        while count:
            self.fill(piece[:count])
            count -= len(piece[:count])

    def rest(self) -> FileDigest:
        """Read to the end, and return what the file was."""
        while piece := self._file.read(PIECE):
            self._sha256.update(piece)
            self.size += len(piece)
        return FileDigest(size=self.size, sha256=self._sha256.hexdigest())


def _header(reader: ShardReader, file_size: int) -> dict[str, tuple[str, list[int], int]]:
    """Return type, shape and bytes of the tensors, in the order in which they follow the header."""
    length = int.from_bytes(reader.take(8), "little")
    if length > min(MAX_HEADER, file_size):
        raise ShardInvalid(f"a header of {length} bytes in a file of {file_size}")
    try:
        table: dict[str, Any] = parse_strict_json(reader.take(length), of_tensors(MAX_SHARD_TENSORS))
        table.pop("__metadata__", None)
        entries = []
        for name, each in table.items():
            begin, end = map(int, each["data_offsets"])
            entries.append((begin, end, name, str(each["dtype"]), [int(size) for size in each["shape"]]))
        entries.sort()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ShardInvalid("its header is no table of tensors") from error
    found, at = {}, 0
    for begin, end, name, dtype, shape in entries:
        if begin != at or end < begin:
            raise ShardInvalid(f"{excerpt(name, 200)} does not follow the tensor before it")
        if (
            len(shape) > MAX_DIMS
            or min(shape, default=0) < 0
            or math.prod(s or 1 for s in shape) > MAX_ELEMENTS
        ):
            raise ShardInvalid(f"{excerpt(name, 200)} has {len(shape)} sizes that no tensor has")
        found[name] = (dtype, shape, end - begin)
        at = end
    if at > file_size:
        raise ShardInvalid(f"{at} bytes of tensors in a file of {file_size}")
    return found
