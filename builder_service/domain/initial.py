"""Initialisations that took a part of the base's weights into A and B: PiSSA and OLoRA, saved as they are.

Such an adapter was trained beside W - s B0 A0, and its change of the whole base W is s (B A - B0 A0), a LoRA of
twice the rank. s B0 A0 follows from W:

- PiSSA (2404.02948): the best approximation of W of rank r, by its singular values.
- OLoRA (2406.01775): s Q R of the first r columns of Q and rows of R, W being Q R. Q R is W's projection on the
  space of its first r columns.

Signs and bases of these factors differ between machines, and their product does not, as long as W says which
space it is: where two singular values are nearly equal, it is not known.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from builder_service.domain.adapter_config import AdapterConfig
from builder_service.domain.derived import Derived, NotMade
from builder_service.domain.full_tensors import BaseTensors
from builder_service.domain.grouping import Grouping
from builder_service.domain.low_rank import LowRank, best_approximation
from builder_service.domain.pairs import Pair
from builder_service.domain.rules.config import CONVERTED
from builder_service.domain.safetensors_header import READABLE, Tensor, TensorFile
from loramux_shared.bundle.modules import NO_LAYER
from loramux_shared.bundle.npy import Array

MAX_ROUNDS: Final = 200
"""Rounds of the iteration; 20 are usual."""
MAX_CHANGE: Final = 1e-8
"""Largest change of the space in the last round."""
_FLAT: Final = 1e-7
"""Share of the largest column below which the rest of a column behind those before it says nothing."""


@dataclass(frozen=True)
class _TakenPart:
    """The part of the base that an initialisation takes: its projection on a space."""

    space: Callable[[Array, int], Array]
    """Returns an orthonormal basis [out, rank] of it."""
    scaled: bool
    """True if it takes so much times the adapter's scale."""


@dataclass(frozen=True)
class _Change:
    """A and B of a module's whole change of the base."""

    pair: Pair
    scale: float
    base: TensorFile
    weight: str
    taken: _TakenPart
    last: list[tuple[str, LowRank]] = field(default_factory=list)
    """Last result of each module of an adapter: B is asked for after A."""

    def low_rank(self, a: Array, b: Array) -> LowRank:
        """Return both, balanced, with the scale in B.

        Raises:
            NotMade: the base does not say it.
        """
        if not self.last or self.last[0][0] != self.weight:
            w = self.base.read(self.weight).astype(np.float64)
            q = self.taken.space(w, len(a))
            share = self.scale if self.taken.scaled else 1.0
            both_a = np.concatenate([a.astype(np.float64), q.T @ w])
            both_b = np.concatenate([self.scale * b.astype(np.float64), -share * q], axis=1)
            self.last[:] = [(self.weight, best_approximation(both_a, both_b, 1.0, len(both_a)))]
        return self.last[0][1]


@dataclass(frozen=True)
class _Side:
    change: _Change
    is_a: bool

    @property
    def sources(self) -> tuple[str, ...]:
        return self.change.pair.a.name, self.change.pair.b.name

    def of(self, *wholes: Array) -> Array:
        low = self.change.low_rank(*wholes)
        return low.a if self.is_a else (low.b / np.float32(self.change.scale))


def with_initial(
    file: TensorFile, pairs: list[Pair], config: AdapterConfig, base: BaseTensors | None, report: Grouping
) -> tuple[TensorFile, list[Pair]]:
    """Return pairs that change the whole base, and the file to read them from."""
    taken = _TAKEN.get(config.initial)
    if taken is None:
        return file, pairs
    found: list[Pair] = []
    tensors, recipes = dict(file.tensors), {}
    last: list[tuple[str, LowRank]] = []
    for pair in pairs:
        change = _change(pair, config, base, taken, last, report)
        if change is None:
            found.append(pair)
            continue
        sides, rank = [], min(2 * pair.a.shape[0], pair.a.shape[1], pair.b.shape[0])
        for tensor, is_a in ((pair.a, True), (pair.b, False)):
            rows, columns = tensor.shape
            shape = (rank, columns) if is_a else (rows, rank)
            name = f"{tensor.name} of the whole base"
            size = 4 * shape[0] * shape[1]
            tensors[name] = Tensor(name, "F32", shape, 0, size, pair.trained_rank if is_a else None)
            recipes[name] = _Side(change, is_a)
            sides.append(tensors[name])
        found.append(replace(pair, a=sides[0], b=sides[1]))
    return Derived(file.path, tensors, file, recipes), found


def _change(
    pair: Pair,
    config: AdapterConfig,
    base: BaseTensors | None,
    taken: _TakenPart,
    last: list[tuple[str, LowRank]],
    report: Grouping,
) -> _Change | None:
    """Return how a pair changes the base; None where it does not fit, or what the base lost is not known."""
    a, b, weight = pair.a.shape, pair.b.shape, f"{pair.key.name}.weight"
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
        return None  # which is reported elsewhere
    scale = config.scale_of(pair.key.name, pair.trained_rank)
    # PEFT takes no part, or another one, of experts and of tensors outside of the layers.
    is_linear = pair.key.expert is None and pair.key.layer != NO_LAYER
    there = base.find(weight) if base is not None and is_linear else None
    theirs = there.tensors[weight] if there is not None else None
    if theirs is None or there is None or not scale or not _is_read(theirs, (b[0], a[1]), a[0]):
        report.add(
            "E_INIT",
            pair.place,
            expected=f"{weight} of the base in 16 or 32 bits, which {config.initial} took a part of",
            found=f"{theirs.dtype} {list(theirs.shape)}" if theirs is not None else "none",
            fix=CONVERTED,
        )
        return None
    return _Change(pair, scale, there, weight, taken, last)


def _is_read(tensor: Tensor, shape: tuple[int, int], rank: int) -> bool:
    return tensor.dtype in READABLE and tensor.shape == shape and rank <= min(shape)


def leading(w: Array, rank: int) -> Array:
    """Return an orthonormal basis [out, rank] of the left singular vectors of the largest singular values.

    Iterates a space of several times the rank, as in 0909.4061 (algorithm 4.4), until the part of it that
    counts stands still.

    Raises:
        NotMade: it does not.
    """
    out, inside = w.shape
    size = min(out, inside, 4 * rank + 16)
    start = np.random.default_rng(0).normal(size=(inside, size))
    space, _ = np.linalg.qr(w @ start)
    found: Array = space[:, :rank]
    for _ in range(MAX_ROUNDS):
        back, _ = np.linalg.qr(w.T @ space)
        space, within = np.linalg.qr(w @ back)
        before, found = found, space @ np.linalg.svd(within)[0][:, :rank]
        if np.linalg.norm(found - before @ (before.T @ found)) < MAX_CHANGE:
            return found
    raise NotMade("E_INIT", f"singular values {rank} and {rank + 1} are nearly equal", CONVERTED)


def first_columns(w: Array, rank: int) -> Array:
    """Return an orthonormal basis [out, rank] of the first columns.

    Raises:
        NotMade: they are not independent.
    """
    q, r = np.linalg.qr(w[:, :rank])
    sizes = np.abs(np.diag(r))
    if sizes.min() <= _FLAT * sizes.max():
        raise NotMade("E_INIT", f"the first {rank} columns are not independent", CONVERTED)
    return q


_TAKEN: Final = {"pissa": _TakenPart(leading, scaled=False), "olora": _TakenPart(first_columns, scaled=True)}
