"""An adapter's weights: one safetensors file, or several and an index that says which tensor is where.

PEFT writes one file; what saves adapters as transformers saves models writes several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from builder_service.domain.safetensors_header import (
    HeaderInvalid,
    TensorFile,
    TooManyTensors,
    read_header,
)
from builder_service.domain.strict_json import JsonInvalid, parse
from loramux_shared.adapter_files import INDEX, WEIGHTS
from loramux_shared.bundle.npy import Array

MAX_INDEX: Final = 16 << 20
"""Bytes; ten times what an index of as many tensors as an adapter may have takes."""


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
    index = _index(folder / INDEX)
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


def _index(path: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    if (size := path.stat().st_size) > MAX_INDEX:
        raise HeaderInvalid(f"{INDEX}: {size} bytes, at most {MAX_INDEX}")
    try:
        table = parse(path.read_bytes())
    except JsonInvalid as error:
        raise HeaderInvalid(f"{INDEX}: not valid JSON: {error}") from error
    files = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise HeaderInvalid(f"{INDEX}: expected an object with a weight_map of names")
    return files
