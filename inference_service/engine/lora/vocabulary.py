"""Embeddings and heads that adapters have of their own. Few steps have any, and the others pay nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from inference_service.engine.lora.segments import Segment

ROUND: Final = 16
"""Elements: every matrix of a packed adapter begins at a multiple, so that it can be read in vectors."""


@dataclass(frozen=True)
class Factors:
    """The factors that are added to the product with a matrix [out, in]."""

    a: Tensor
    """[rank, in]; of the embeddings, where a token chooses one of the inputs, [in, rank]."""
    b: Tensor
    """[out, rank], the scale included."""


@dataclass(frozen=True)
class OwnTable:
    """An adapter's rows for a matrix [vocab, hidden] of the base, be it embeddings or a head."""

    factors: Factors | None = None
    rows: Tensor | None = None
    """[n, hidden]: they take the place of the base's."""
    tokens: Tensor | None = None
    """int32 [n], ascending: whose rows they are; None: those of all tokens."""

    def tensors(self) -> list[Tensor]:
        """Return those that there are."""
        of_factors = [] if self.factors is None else [self.factors.a, self.factors.b]
        return [*of_factors, *(each for each in (self.rows, self.tokens) if each is not None)]


@dataclass(frozen=True)
class Vocabulary:
    """The changes of an adapter outside of the layers."""

    embedding: OwnTable = OwnTable()
    head: OwnTable = OwnTable()
    size: int | None = None
    """Tokens of the adapter's model; None: as many as the base has."""

    def packed(self, dtype: torch.dtype) -> Packing:
        """Return how it lies in one flat piece of a type."""
        return Packing(self, dtype)


class Packing:
    """The tensors of a vocabulary one behind the other, and where each begins."""

    def __init__(self, vocabulary: Vocabulary, dtype: torch.dtype) -> None:
        self._vocabulary, self._dtype = vocabulary, dtype

    @property
    def numel(self) -> int:
        """Elements of the piece."""
        return sum(padded(place.stop - place.start) for _, place in self._places())

    def write(self, flat: Tensor) -> None:
        """Write it to [numel]."""
        for tensor, place in self._places():
            values = tensor.view(self._dtype) if tensor.dtype is torch.int32 else tensor
            flat[place].copy_(values.reshape(-1))

    def read(self, flat: Tensor) -> Vocabulary:
        """Return views of [numel], in any copy of it."""
        views = (
            (flat[place].view(torch.int32) if tensor.dtype is torch.int32 else flat[place]).view(tensor.shape)
            for tensor, place in self._places()
        )
        embedding, head = [self._own(table, views) for table in self._tables()]
        return Vocabulary(embedding, head, self._vocabulary.size)

    def _tables(self) -> tuple[OwnTable, OwnTable]:
        return self._vocabulary.embedding, self._vocabulary.head

    def _places(self) -> Iterator[tuple[Tensor, slice]]:
        """Yield each tensor with its place; integers as so many elements of the type as have their bytes."""
        at = 0
        for table in self._tables():
            for tensor in table.tensors():
                whole = tensor.dtype is torch.int32
                count = tensor.nbytes // self._dtype.itemsize if whole else tensor.numel()
                yield tensor, slice(at, at + count)
                at += padded(count)

    @staticmethod
    def _own(table: OwnTable, pieces: Iterator[Tensor]) -> OwnTable:
        factors = None if table.factors is None else Factors(next(pieces), next(pieces))
        rows = None if table.rows is None else next(pieces)
        return OwnTable(factors, rows, None if table.tokens is None else next(pieces))


class OwnSegment(NamedTuple):
    """Consecutive rows of an adapter with a vocabulary of its own."""

    vocabulary: Vocabulary
    start: int
    end: int


class StepVocabulary:
    """The adapters of a step that have embeddings or a head of their own."""

    def __init__(self, segments: Sequence[OwnSegment], drawing: Sequence[OwnSegment]) -> None:
        """Take their segments of the step's rows, and of those that go through the head."""
        self._segments, self._drawing = segments, drawing

    def known(self, tokens: Tensor, vocab: int) -> Tensor:
        """Return tokens [T], with another in the place of those that a base of so many does not have."""
        return tokens.clamp(max=vocab - 1) if _largest(self._segments) > vocab else tokens

    def embed(self, tokens: Tensor, hidden: Tensor, scale: float, *, by_row: bool) -> None:
        """Change hidden [T, hidden size], the base's embeddings of tokens [T] times a scale, in place."""
        own_rows = ((each.vocabulary.embedding, each) for each in self._segments)
        for table, rows in _changing(own_rows, by_row=by_row):
            own = hidden[rows]
            if table.factors is not None:
                x = table.factors.a.index_select(0, tokens[rows])
                own.addmm_(x, table.factors.b.t(), alpha=scale)
            if table.rows is not None:
                own.copy_(_replaced(table.rows, table.tokens, tokens[rows], own, scale))

    def head(self, hidden: Tensor, logits: Tensor, *, by_row: bool) -> Tensor:
        """Return what becomes of logits [N, vocab], which the base's head makes of hidden [N, hidden size].

        There are as many columns as the largest of the vocabularies needs.
        """
        if (more := _largest(self._drawing) - logits.shape[1]) > 0:
            logits = pad(logits, (0, more))
        own_rows = ((each.vocabulary.head, each) for each in self._drawing)
        for table, rows in _changing(own_rows, by_row=by_row):
            own, x = logits[rows], hidden[rows]
            if table.factors is not None:
                of_base = own[:, : len(table.factors.b)]
                of_base.addmm_(torch.mm(x, table.factors.a.t()), table.factors.b.t())
            if table.rows is not None and table.tokens is None:
                own[:, : len(table.rows)] = torch.mm(x, table.rows.t())
            elif table.rows is not None and table.tokens is not None:
                own.index_copy_(1, table.tokens.long(), torch.mm(x, table.rows.t()))
        return logits

    def bound(self, logits: Tensor, vocab: int) -> None:
        """Let no row of logits [N, columns] have a token that its model does not have; the base has so many."""
        columns = logits.shape[1]
        if columns == vocab and all(each.vocabulary.size is None for each in self._drawing):
            return
        sizes = [vocab] * len(logits)
        for own, start, end in self._drawing:
            sizes[start:end] = [own.size or vocab] * (end - start)
        bounds = torch.tensor(sizes, device=logits.device)[:, None]
        logits.masked_fill_(torch.arange(columns, device=logits.device) >= bounds, -torch.inf)


def _changing(
    tables: Iterable[tuple[OwnTable, OwnSegment]], *, by_row: bool
) -> Iterator[tuple[OwnTable, slice]]:
    """Yield tables that change something, and whose rows; where it is said, of each row apart."""
    for table, (_, start, end) in tables:
        if table.tensors():
            size = 1 if by_row else end - start
            yield from ((table, slice(first, first + size)) for first in range(start, end, size))


def _replaced(rows: Tensor, ids: Tensor | None, tokens: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Return rows [T, hidden size] of tokens [T]; hidden's, where a token has no other."""
    if ids is None:
        return rows.index_select(0, tokens) * scale
    places = torch.searchsorted(ids, tokens.to(torch.int32)).clamp_(max=len(ids) - 1)
    found = ids.index_select(0, places) == tokens
    return torch.where(found[:, None], rows.index_select(0, places) * scale, hidden)


class Vocabularies:
    """The vocabularies of the adapters in a bank, by slot; on the engine's thread."""

    def __init__(self) -> None:
        self._of: dict[int, Vocabulary] = {}

    def enter(self, slot: int, vocabulary: Vocabulary | None) -> None:
        """Note that of a slot, if there is one."""
        if vocabulary is not None:
            self._of[slot] = vocabulary

    def leave(self, slot: int) -> None:
        """Forget it, if there is one."""
        self._of.pop(slot, None)

    def of(
        self, segments: Sequence[Segment], drawing: Callable[[], Sequence[Segment]]
    ) -> StepVocabulary | None:
        """Return what a step does; None where no adapter of its segments has anything to do.

        What gives the segments of the rows that go through the head is asked only otherwise.
        """
        if not self._of or not (own := self._own(segments)):
            return None
        return StepVocabulary(own, self._own(drawing()))

    def _own(self, segments: Sequence[Segment]) -> list[OwnSegment]:
        return [
            OwnSegment(self._of[segment.slot], segment.start, segment.end)
            for segment in segments
            if segment.slot in self._of
        ]


def _largest(segments: Iterable[OwnSegment]) -> int:
    return max((each.vocabulary.size or 0 for each in segments), default=0)


def padded(count: int) -> int:
    """Return a number of elements, rounded up to a multiple of `ROUND`."""
    return -(-count // ROUND) * ROUND
