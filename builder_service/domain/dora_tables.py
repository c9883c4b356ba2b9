"""DoRA of embeddings and head: whole matrices c * (W + sBA), which take the place of the base's.

As in PEFT (0.21): of a head c is over the norms of rows, as of any linear, and of embeddings over those of
columns, one for each element of what layers begin with. Neither is a product of low rank.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.full_tensors import BaseTensors, base_tensor
from builder_service.domain.grouping import Grouping
from builder_service.domain.own_rows import PlannedRows
from builder_service.domain.pairs import Pair
from builder_service.domain.rules.stacks import MERGE
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from builder_service.domain.tensor_names import FullKey
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bundle.manifest import Replaced
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.bundle.npy import Array

BLOCK_ELEMENTS: Final = 1 << 20
"""Elements that are computed at once, in float64."""


@dataclass(frozen=True)
class DoraTable:
    """A matrix [vocab, hidden] of embeddings or a head."""

    file: TensorFile
    """File of the adapter."""
    pair: Pair
    magnitude: Tensor
    scale: float
    base: TensorFile
    weight: str
    """The base's tensor."""
    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Array:
        """Return some rows in float32."""
        c = self._c if self._of_columns else self._c[start:stop, None]
        found: Array = (c * self._sum(start, stop)).astype(np.float32)
        return found

    @property
    def _of_columns(self) -> bool:
        return self.pair.key.modules[0].name == "embedding"

    @cached_property
    def _c(self) -> Array:
        """[hidden] of embeddings, [vocab] of a head; not finite where a norm is zero."""
        count, width = self.shape
        squares = np.zeros(width if self._of_columns else count)
        for start, stop in _blocks(0, count, width):
            square = self._sum(start, stop) ** 2
            if self._of_columns:
                squares += square.sum(0)
            else:
                squares[start:stop] = square.sum(1)
        magnitudes = self.file.read(self.magnitude.name).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            found: Array = magnitudes / np.sqrt(squares)
        return found

    @cached_property
    def _factors(self) -> tuple[Array, Array]:
        """Return the factors of the product.

        That of each row, [vocab, rank], and that of all rows, [rank, hidden].
        """
        a = self.file.read(self.pair.a.name).astype(np.float64)
        b = self.scale * self.file.read(self.pair.b.name).astype(np.float64)
        return (a.T, b.T) if self._of_columns else (b, a)

    def _sum(self, start: int, stop: int) -> Array:
        """Return rows of W + sBA in float64."""
        of_rows, of_all = self._factors
        product: Array = of_rows[start:stop] @ of_all
        return self.base.read(self.weight, (start, stop)).astype(np.float64) + product


@dataclass(frozen=True)
class WithDora(TensorFile):
    """A file, and such matrices by their names."""

    inner: TensorFile
    tables: Mapping[str, DoraTable]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """Return a tensor, or some of its rows."""
        table = self.tables.get(name)
        return self.inner.read(name, rows) if table is None else table.rows(*(rows or (0, table.shape[0])))

    def pieces(self, name: str, elements: int, rows: tuple[int, int] | None = None) -> Iterator[Array]:
        """Yield what `read` returns as flat pieces, never all of a large matrix at once."""
        table = self.tables.get(name)
        if table is None:
            yield from self.inner.pieces(name, elements, rows)
            return
        for start, stop in _blocks(*(rows or (0, table.shape[0])), table.shape[1]):
            flat = table.rows(start, stop).reshape(-1)
            for at in range(0, flat.size, elements):
                yield flat[at : at + elements]

    def origins(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors in the adapter's file that one is made from."""
        table = self.tables.get(name)
        sources = (name,) if table is None else tuple(tensor.name for tensor in table.pair.tensors)
        return tuple(origin for source in sources for origin in self.inner.origins(source))


def _blocks(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_ELEMENTS // width)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def with_dora_tables(
    file: TensorFile,
    pairs: list[Pair],
    config: AdapterConfig,
    base: ModelConfig,
    weights: BaseTensors | None,
    report: Grouping,
) -> tuple[TensorFile, list[Pair], list[PlannedRows]]:
    """Return the pairs that stay A and B, and the rows that those of DoRA become, with the file for them.

    Where something is reported, before or here, all pairs stay.
    """
    dora = [pair for pair in pairs if pair.key.layer == NO_LAYER and pair.magnitude is not None]
    if report or not dora:
        return file, pairs, []
    tables: dict[str, DoraTable] = {}
    for pair in dora:
        table = _table(file, pair, config, base, weights, report)
        if table is not None:
            tables[f"{pair.key.name} of DoRA"] = table
    if report:
        return file, pairs, []
    tensors = dict(file.tensors)
    for name, table in tables.items():
        tensors[name] = Tensor(name, "F32", table.shape, 0, 4 * table.shape[0] * table.shape[1])
    made = WithDora(file.path, tensors, file, tables)
    planned = []
    for name, table in tables.items():
        (module,), (count, features) = table.pair.key.modules, table.shape
        whole = Replaced(module_id=module.id, module=module.name, tokens=((0, count),), features=features)
        planned.append(PlannedRows(whole, made, name, ((0, count),)))
    return made, [pair for pair in pairs if pair not in dora], planned


def _table(
    file: TensorFile,
    pair: Pair,
    config: AdapterConfig,
    base: ModelConfig,
    weights: BaseTensors | None,
    report: Grouping,
) -> DoraTable | None:
    key, shape = pair.key, (base.dims.vocab, base.dims.hidden)
    if config.ensure_weight_tying and base.tied_embeddings:
        found = "ensure_weight_tying beside magnitudes"
        report.add("E_DORA", key.place, expected="embeddings and head apart", found=found, fix=MERGE)
        return None
    there, name = base_tensor(FullKey(key.name, "E_DORA"), base, weights)
    if there is None or there.tensors[name].dtype not in READABLE or there.tensors[name].shape != shape:
        expected = f"the base's {key.leaf}.weight {list(shape)} in float32, float16 or bfloat16"
        report.add("E_DORA", key.place, expected=expected, found="none", fix=MERGE)
        return None
    magnitude = pair.magnitude or pair.b
    scale = config.scale_of(key.name, pair.trained_rank)
    return DoraTable(file, replace(pair), magnitude, scale, there, name, shape)
