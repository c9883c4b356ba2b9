"""Tensors that are not in a file, and are made from those that are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from builder_service.domain.safetensors_header import TensorFile
from loramux_shared.bundle.npy import Array

CACHED: Final = 4
"""Tensors of the file that were read last: what is made from one of them is asked for one after the other."""


class NotMade(Exception):
    """A finding in the making: the parts of a tensor do not determine it."""

    def __init__(self, code: str, found: str, fix: str) -> None:
        super().__init__(found)
        self.code = code
        self.found = found
        self.fix = fix


class TensorRecipe(Protocol):
    """A way to make a tensor."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors of the file that it is made from."""
        ...

    def of(self, *wholes: Array) -> Array:
        """Return the tensor, or raise NotMade."""
        ...


@dataclass(frozen=True)
class Product:
    """A matrix that is made of others."""

    sources: tuple[str, ...]
    make: Callable[..., Array]

    def of(self, *wholes: Array) -> Array:
        """Return it, in float32."""
        with np.errstate(over="ignore", invalid="ignore"):  # later checks report values that are not finite
            return np.ascontiguousarray(self.make(*(whole.astype(np.float32) for whole in wholes)))


@dataclass(frozen=True)
class Derived(TensorFile):
    """A file whose tensors are there, and such that are made from them."""

    inner: TensorFile
    recipes: Mapping[str, TensorRecipe]
    _kept: dict[str, Array] = field(default_factory=dict, compare=False)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Array:
        """Return a tensor, or some of its rows."""
        recipe = self.recipes.get(name)
        if recipe is None:
            return self.inner.read(name, rows)
        made = recipe.of(*map(self._whole, recipe.sources))
        return made if rows is None else made[slice(*rows)]

    def pieces(self, name: str, elements: int, rows: tuple[int, int] | None = None) -> Iterator[Array]:
        """Yield what `read` returns as flat pieces of at most so many elements."""
        if name not in self.recipes:
            yield from self.inner.pieces(name, elements, rows)
            return
        flat = self.read(name, rows).reshape(-1)
        for start in range(0, flat.size, elements):
            yield flat[start : start + elements]

    def origins(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors in the file that it is made from."""
        recipe = self.recipes.get(name)
        sources = (name,) if recipe is None else recipe.sources
        return tuple(origin for source in sources for origin in self.inner.origins(source))

    def _whole(self, name: str) -> Array:
        if name not in self._kept:
            if len(self._kept) >= CACHED:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self.inner.read(name)
        return self._kept[name]
