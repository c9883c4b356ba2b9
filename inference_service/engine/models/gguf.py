"""The tensors of a GGUF file, by the names and in the order of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from inference_service.engine.kernels.blocks import WeightBlocks
from inference_service.engine.models.gguf_blocks import BLOCK_TYPES
from inference_service.engine.models.packed import Keepable, Pieces
from inference_service.engine.models.shard import Shard, ShardReader
from loramux_shared.bases.weight_format import WeightScheme
from loramux_shared.faults import CheckpointInvalid
from loramux_shared.gguf.files import checkpoint_name, rows_of_head
from loramux_shared.gguf.header import FREQUENCIES, GgufHeader, read_header

FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def names_of(path: Path) -> list[str]:
    """Return the names of a file's tensors as a checkpoint has them; those of blocks end with their type.

    Raises:
        CheckpointInvalid: the file is not one that is served.
    """
    header = read_header(path)
    return [
        checkpoint_name(header, name, place) for name, place in header.tensors.items() if name != FREQUENCIES
    ]


def read_gguf(path: Path) -> Shard:
    """Read a file; blocks are bytes [rows, bytes of a row].

    Raises:
        CheckpointInvalid: the file is not one that is served.
        ShardInvalid: it is cut off while it is read.
        OSError: it cannot be read.
    """
    header, tensors = read_header(path), {}
    with path.open("rb", buffering=0) as file:
        reader = ShardReader(file)
        for name, place in header.tensors.items():
            reader.skip(place.offset - reader.size)
            data = torch.empty(place.num_bytes, dtype=torch.uint8)
            reader.fill(memoryview(data.numpy().data))
            if name != FREQUENCIES:
                tensors[checkpoint_name(header, name, place)] = _shaped(header, name, data)
        return Shard(tensors, {}, reader.rest())


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor as `read_gguf` does.

    Raises:
        CheckpointInvalid: there is none of this name.
        OSError: the file cannot be read.
    """
    header = read_header(path)
    for own, place in header.tensors.items():
        if own != FREQUENCIES and checkpoint_name(header, own, place) == name:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = torch.frombuffer(bytearray(file.read(place.num_bytes)), dtype=torch.uint8)
            return _shaped(header, own, data)
    raise header.invalid(f"expected a tensor {name}, found none.")


def _shaped(header: GgufHeader, name: str, data: Tensor) -> Tensor:
    """Return a tensor of its bytes."""
    place = header.tensors[name]
    dtype = FLOATS.get(place.type)
    tensor = data.view(*place.shape[:-1], -1) if dtype is None else data.view(dtype).view(place.shape)
    return _in_halves(header, name, tensor)


def _in_halves(header: GgufHeader, name: str, tensor: Tensor) -> Tensor:
    """Return queries and keys with the rows of a head in halves that are rotated, as checkpoints have them."""
    head = rows_of_head(header, name)
    if head is None:
        return tensor
    return tensor.view(-1, head // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


class FoundBlocks:
    """The weights of blocks among the tensors of a file."""

    def __init__(self, names: Collection[str]) -> None:
        """Look at the names of the tensors."""
        split = (name.rpartition(".") for name in names)
        self._types = {stem: kind for stem, _, kind in split if kind in BLOCK_TYPES}

    def __contains__(self, name: str) -> bool:
        """Return True if a weight is of blocks."""
        return name in self._types

    def parts(self, name: str) -> Mapping[str, str]:
        """Return the tensor of a weight by its role, its type."""
        return {self._types[name]: f"{name}.{self._types[name]}"}

    def open(self, pieces: Pieces) -> BlockWeight:
        """Return a weight.

        Raises:
            CheckpointInvalid: it has another shape than the config implies, or scales that are no numbers.
        """
        return BlockWeight(pieces)


class BlockWeight(Keepable):
    """A matrix of blocks."""

    turned, matrices = False, 1

    def __init__(self, pieces: Pieces) -> None:
        """Take the bytes.

        Raises:
            CheckpointInvalid: they are those of another shape.
        """
        self.pieces = pieces
        self.rows, self.columns = pieces.matrix()
        [(kind, data)] = pieces.tensors.items()
        self._type = BLOCK_TYPES[kind]
        self.scheme = WeightScheme("blocks")
        row_bytes = self.columns // self._type.values * self._type.num_bytes
        if self.columns % self._type.values or tuple(data.shape) != (self.rows, row_bytes):
            found = (data.shape[0], data.shape[-1] // self._type.num_bytes * self._type.values)
            raise CheckpointInvalid(f"{pieces.name}: the metadata implies shape {pieces.shape}, found {found}.")
        self._data = data.view(self.rows, -1, self._type.num_bytes)

    def part(self, matrix: int, begin: int, end: int) -> Tensor:
        """Return rows in float32."""
        del matrix
        return self._type.unpack(self._data[begin:end]).widened()

    def kept(self) -> WeightBlocks | None:
        """Return the weight as products take it; None where they take it widened.

        Raises:
            CheckpointInvalid: it has scales that are no numbers.
        """
        if not self._type.stays:
            return None
        blocks = self._type.unpack(self._data)
        shared = [each for each in (blocks.scales, blocks.offsets) if each is not None]
        if not all(bool(each.isfinite().all()) for each in shared):
            raise self.pieces.invalid("scales", "expected finite numbers.")
        return blocks
