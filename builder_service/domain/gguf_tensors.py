"""The tensors of a GGUF file that are not of blocks, for a builder, which has no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from builder_service.domain.safetensors_header import Tensor, TensorFile
from loramux_shared.bundle.npy import Array
from loramux_shared.gguf.files import checkpoint_name, rows_of_head
from loramux_shared.gguf.header import FREQUENCIES, WHOLE, read_header


@dataclass(frozen=True)
class WholeTensors(TensorFile):
    """Tensors by the names and with the rows of a checkpoint."""

    heads: Mapping[str, int]
    """Rows of a head, of tensors whose rotated pairs are neighbours in the file and lie in halves here."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """Return a tensor, or some of its rows."""
        if name not in self.heads:
            return super().read(name, rows)
        head, (start, stop) = self.heads[name], rows or (0, self.tensors[name].shape[0])
        first = start // head * head
        pairs = super().read(name, (first, -(-stop // head) * head))
        return in_halves(pairs, head)[start - first : stop - first]

    def pieces(self, name: str, elements: int, rows: tuple[int, int] | None = None) -> Iterator[Array]:
        """Yield what `read` returns as flat pieces of at most so many elements."""
        if name not in self.heads:
            yield from super().pieces(name, elements, rows)
            return
        flat = self.read(name, rows).reshape(-1)
        yield from (flat[start : start + elements] for start in range(0, len(flat), elements))


def in_halves(rows: Array, head: int) -> Array:
    """Return rows whose rotated pairs are neighbours with those of each head in halves."""
    return rows.reshape(-1, head // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_tensors(path: Path) -> WholeTensors:
    """Read the header of a file.

    Raises:
        CheckpointInvalid: the file is not one that is served.
        OSError: it cannot be read.
    """
    header, found, heads = read_header(path), dict[str, Tensor](), dict[str, int]()
    for own, place in header.tensors.items():
        if place.type not in WHOLE or own == FREQUENCIES:
            continue
        name = checkpoint_name(header, own, place)
        found[name] = Tensor(name, place.type, place.shape, place.offset, place.num_bytes)
        if (head := rows_of_head(header, own)) is not None:
            heads[name] = head
    return WholeTensors(path, found, heads)
