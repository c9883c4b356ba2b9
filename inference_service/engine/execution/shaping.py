"""The changes of requests to their logits, as data for the device, and the way of drawn tokens to the host.

`sampler.shape` is the reference.

A sequence that shapes its logits has a place in the state on the device, which counts its tokens as they are
drawn: so its next draw need not wait until the last token is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from inference_service.core.constraint import packed, unpacked
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.execution.runner import mark, to_device, to_host
from inference_service.engine.execution.sampler import (
    SCORED_ROWS,
    marked,
    processed,
    row_params,
    scored_rows,
    shapes,
    tokens_of,
)
from inference_service.engine.kernels.sampling import (
    ShapedRow,
    ShapingState,
    ShapingTables,
    pack_shapes,
    sample_shaped,
    scores,
)
from inference_service.engine.kernels.sampling.layout import FIELDS
from inference_service.engine.kernels.sampling.shaping import (
    ALWAYS,
    NOTHING,
    PIECE,
    SHAPE_FIELDS,
    Words,
    edits_of,
    words_of,
)


@dataclass(frozen=True)
class ShapingPlace:
    """The place of a sequence's state, and the constant part of its request."""

    index: int
    bias: Words
    """Edits."""
    stops: Words
    restricted: bool
    endings: dict[int, dict[tuple[int, ...], Words]] = field(default_factory=dict)
    """Edits by the number of tokens of a bad word before its last one, and these tokens."""


@dataclass(frozen=True, eq=False)
class Shaped:
    """A row of a step whose logits are shaped."""

    row: int
    seq: Sequence
    place: ShapingPlace
    generated: int
    """Tokens of the answer before, drafted ones too."""
    ahead: int = 0
    """Drafted ones of those."""


class Shaper:
    """Draws, on the device, the tokens of sequences that shape their logits.

    A sequence takes its place at its first such draw, and gives it back when it is gone, or when another one
    needs it; then it is made again, for a sequence outside of a step has no token in flight at its next draw.
    """

    def __init__(self, max_seqs: int, vocab: int, device: torch.device) -> None:
        self.state = ShapingState(max_seqs, vocab, device)
        self._places: WeakKeyDictionary[Sequence, ShapingPlace] = WeakKeyDictionary()

    def rows(self, seqs: Seq[Sequence], ahead: Seq[int] | None = None) -> list[Shaped]:
        """Return the rows of a step, of which seqs are, that are to be drawn here.

        Of a sequence with a draft there are several, each with how many of its tokens stand ahead.
        """
        found = [(row, seq) for row, seq in enumerate(seqs) if shapes(seq, seq.num_generated)]
        here = {seq for _, seq in found}
        more = ahead or [0] * len(seqs)
        return [
            Shaped(row, seq, self._place(seq, here), seq.num_generated + more[row], more[row])
            for row, seq in found
        ]

    def draw(self, logits: Tensor, ids: Tensor, rows: Seq[Shaped]) -> dict[int, Tensor]:
        """Draw the tokens ids of rows of logits [N, vocab], which stay as they are.

        Returns what was made of the logits [vocab], by row, where their log probabilities are asked for.
        """
        masks: dict[int, Tensor] = {}
        for first in range(0, len(rows), PIECE):
            piece = rows[first : first + PIECE]
            tables = self.tables(piece)
            sample_shaped(logits, tables, self.state, ids)
            for place, row in enumerate(piece):
                params = row.seq.sampling
                if params.logprobs is not None and params.logprobs_mode == "processed":
                    masks[row.row] = tables.shaped[place]
        return masks

    def tables(self, rows: Seq[Shaped]) -> ShapingTables:
        """Return what a draw of these rows reads."""
        packed = pack_shapes([_shaped(row) for row in rows], self.state.vocab)
        return ShapingTables.over(self._to_device(packed), len(rows), self.state.vocab)

    def warm_up(self, logits: Tensor, ids: Tensor) -> None:
        """Compile what draws launch; no token is drawn."""
        packed = torch.zeros(SHAPE_FIELDS + FIELDS, dtype=torch.int32, device=logits.device)
        sample_shaped(logits, ShapingTables.over(packed, 1, self.state.vocab), self.state, ids)

    def _place(self, seq: Sequence, here: set[Sequence]) -> ShapingPlace:
        place = self._places.get(seq)
        if place is None:
            index = self._free(here)
            place = self._places[seq] = _place_of(seq.sampling, index)
            self._fill(index, seq)
        return place

    def _free(self, here: set[Sequence]) -> int:
        """Return the index of a place that no sequence of the step has."""
        taken = {place.index: seq for seq, place in self._places.items()}
        if len(taken) < self.state.places:
            return next(index for index in range(self.state.places) if index not in taken)
        index, seq = next((index, seq) for index, seq in taken.items() if seq not in here)
        del self._places[seq]
        return index

    def _fill(self, index: int, seq: Sequence) -> None:
        """Put the state of a sequence, all of whose tokens are known, at a place."""
        progress = seq.progress
        params, vocab = seq.sampling, self.state.vocab
        if params.penalizes:
            counts = np.zeros(vocab, np.int32)
            counts[progress.tokens[: seq.num_prompt]] = 1
            np.add.at(counts, progress.tokens[seq.num_prompt :], 2)
            self.state.count(index, self._to_device(counts))
        if params.allowed_token_ids is not None or 0 in params.bad_words:
            allowed = np.ones(vocab, np.bool_)
            if params.allowed_token_ids is not None:
                allowed = unpacked(params.allowed_token_ids, vocab)
            allowed[list(params.bad_words.get(0, {}).get((), ()))] = False
            self.state.restrict(index, self._to_device(words_of(packed(allowed), vocab)))
        self.state.last[index].fill_(progress.tokens[-1])

    def _to_device(self, values: Words) -> Tensor:
        device = self.state.last.device
        host = torch.empty(len(values), dtype=torch.int32, pin_memory=device.type == "cuda")
        host.numpy()[:] = values
        return host.to(device, non_blocking=True)


def _place_of(params: SamplingParams, index: int) -> ShapingPlace:
    bias = params.logit_bias
    endings: dict[int, dict[tuple[int, ...], Words]] = {}
    for length, words in params.bad_words.items():
        for before, lasts in words.items() if length else ():
            own = edits_of(lasts, [before[-1]] * len(lasts), [-np.inf] * len(lasts))
            group = endings.setdefault(length, {})
            group[before[:-1]] = np.concatenate([group.get(before[:-1], NOTHING), own])
    return ShapingPlace(
        index,
        edits_of(list(bias), [ALWAYS] * len(bias), list(bias.values())),
        np.array(sorted(params.stop_token_ids), np.int32),
        params.allowed_token_ids is not None or 0 in params.bad_words,
        endings,
    )


def _shaped(row: Shaped) -> ShapedRow:
    """Return the edits of a row; of the answer, the last token alone may be unknown here."""
    seq, place, params = row.seq, row.place, row.seq.sampling
    edits = [place.bias]
    end = seq.num_prompt + row.generated - 1
    for length, words in place.endings.items():
        if length <= row.generated:
            edits.append(words.get(tuple(seq.progress.tokens[end - length + 1 : end]), NOTHING))
    return ShapedRow(
        row.row,
        place.index,
        row_params(seq, row.generated),
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        place.restricted,
        None if seq.grammar is None else seq.grammar.mask(row.ahead),
        np.concatenate(edits),
        place.stops if row.generated < params.min_tokens else NOTHING,
    )


class Reading:
    """The tokens of a step on their way to the host: ids [>= N], drawn from logits [N, vocab] for N sequences.

    Of a sequence with a draft there are several rows, and ahead says how many of its tokens stand before each.
    Where a request shapes its logits, its token is drawn here, behind the step. A grammar must have seen the
    tokens before, so where one of them is in flight, that draw and all copies are put off to ``finish``; until
    then logits and ids must stay as they are.
    """

    def __init__(
        self, logits: Tensor, ids: Tensor, seqs: Seq[Sequence], shaper: Shaper, ahead: Seq[int] | None = None
    ) -> None:
        self._logits, self._ids, self._seqs, self._shaper = logits, ids, seqs, shaper
        rows = shaper.rows(seqs, ahead)
        self._shaped = bool(rows)
        now: list[Shaped] = []
        self._late: list[Shaped] = []
        for row in rows:
            (self._late if row.seq.grammar is not None and row.seq.progress.in_flight else now).append(row)
        self._made = shaper.draw(logits, ids, now)
        """Source of the log probabilities of rows whose logits are shaped."""
        self._copies = None if self._late else self._copy()

    @torch.inference_mode()
    def finish(self) -> Callable[[], list[Token]]:
        """Draw what was put off; the tokens before are known now. The result waits for those of this step."""
        if self._copies is None:
            self._made |= self._shaper.draw(self._logits, self._ids, self._late)
            self._copies = self._copy()
        return self._copies

    def wait(self) -> list[Token]:
        """Wait for the tokens."""
        return self.finish()()

    def _copy(self) -> Callable[[], list[Token]]:
        """Begin to copy tokens and scores; the result waits for them."""
        logits, ids, num = self._logits, self._ids, len(self._seqs)
        drawn, tops = to_host(ids[:num]), to_host(logits[:num].amax(dim=-1))
        impossible = to_host(self._shaper.state.impossible[:num]) if self._shaped else None
        scored = []
        for count, mode, rows in scored_rows(self._seqs, SCORED_ROWS):
            index = to_device(rows, ids.device)
            own, drawn_ids = logits.index_select(0, index), ids.index_select(0, index)
            if mode == "processed":
                own = self._processed(own, drawn_ids, rows)
            scored.append((rows, [to_host(part) for part in scores(own, drawn_ids, count)]))
        self._made.clear()
        done = mark(drawn, ids.device)

        def wait() -> list[Token]:
            tokens = [Token(token) for token in done().tolist()]
            for rows, parts in scored:
                for row, token in zip(rows, tokens_of(parts), strict=True):
                    tokens[row] = token
            for row in () if impossible is None else impossible.nonzero().flatten().tolist():
                tokens[row].impossible = True
            return marked(tokens, tops.tolist())

        return wait

    def _processed(self, logits: Tensor, ids: Tensor, rows: Seq[int]) -> Tensor:
        """Return what rows were drawn from; logits are theirs, ids their tokens."""
        shaped = logits.float()
        for place, row in enumerate(rows):
            if row in self._made:
                shaped[place] = self._made[row]
        return processed(shaped, ids, [self._seqs[row].sampling for row in rows])
