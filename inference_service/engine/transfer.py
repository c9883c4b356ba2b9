"""Between host and device: asynchronous copies, and tokens that are awaited when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Seq

import torch
from torch import Tensor

from inference_service.core.sampling import LogprobsMode
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.sampler import PIECE, marked, processed, scores, tokens_of
from inference_service.engine.shaping import Shaped, Shaper


def to_device(values: Seq[int], device: torch.device) -> Tensor:
    """Return numbers as int64 on the device, by pinned memory, which is kept until they are there."""
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy in the host's memory; it is complete when the device has done what it was given so far."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def score_prompt(seq: Sequence, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Begin to score the next N tokens of a prompt, each by the row before it; hidden is [N, hidden size].

    The result waits for the scores and gives them to the sequence.
    """
    progress, count = seq.progress, seq.sampling.prompt_logprobs or 0
    copies: list[list[Tensor]] = []
    for start in range(0, len(hidden), PIECE):
        rows, first = hidden[start : start + PIECE], progress.num_scored
        progress.num_scored += len(rows)
        ids = to_device(progress.tokens[first : progress.num_scored], hidden.device)
        copies.append([to_host(part) for part in scores(head(rows), ids, count)])
    if not copies:
        return lambda: None
    done = mark(copies[-1][0], hidden.device)

    def keep() -> None:
        done()
        for parts in copies:
            progress.prompt_scores += tokens_of(parts)

    return keep


class Reading:
    """The tokens of a step on their way to the host: ids [>= N], drawn from logits [N, vocab] for N sequences.

    Of a sequence with a draft there are several rows, and ahead says how many of its tokens stand before each.
    Where a request shapes its logits, its token is drawn here, behind the step. A grammar must have seen the
    tokens before, so where one of them is in flight, that draw and all copies are put off to ``finish``; until
    then logits and ids must stay as they are.
    """

    def __init__(
        self,
        logits: Tensor,
        ids: Tensor,
        seqs: Seq[Sequence],
        shaper: Shaper,
        ahead: Seq[int] | None = None,
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
        groups: dict[tuple[int, LogprobsMode], list[int]] = {}
        for row, seq in enumerate(self._seqs):
            if seq.sampling.logprobs is not None:
                groups.setdefault((seq.sampling.logprobs, seq.sampling.logprobs_mode), []).append(row)
        drawn, tops = to_host(ids[:num]), to_host(logits[:num].amax(dim=-1))
        impossible = to_host(self._shaper.state.impossible[:num]) if self._shaped else None
        scored = []
        for (count, mode), rows in groups.items():
            size = len(rows) if mode == "raw" else PIECE
            for first in range(0, len(rows), size):
                some = rows[first : first + size]
                index = to_device(some, ids.device)
                own, drawn_ids = logits.index_select(0, index), ids.index_select(0, index)
                if mode == "processed":
                    own = self._processed(own, drawn_ids, some)
                scored.append((some, [to_host(part) for part in scores(own, drawn_ids, count)]))
        self._made.clear()
        done = mark(drawn, ids.device)

        def wait() -> list[Token]:
            tokens = [Token(token) for token in done().tolist()]
            for rows, parts in scored:
                for row, token in zip(rows, tokens_of(parts), strict=True):
                    tokens[row] = token
            for row in () if impossible is None else impossible.nonzero().flatten().tolist():
                tokens[row] = tokens[row]._replace(impossible=True)
            return marked(tokens, tops.tolist())

        return wait

    def _processed(self, logits: Tensor, ids: Tensor, rows: Seq[int]) -> Tensor:
        """Return what rows were drawn from; logits are theirs, ids their tokens."""
        shaped = logits.float()
        for place, row in enumerate(rows):
            if row in self._made:
                shaped[place] = self._made[row]
        return processed(shaped, ids, [self._seqs[row].sampling for row in rows])


def mark(copy: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Return what waits until the device has done what it was given up to now, and returns the copy."""
    if device.type != "cuda":
        return lambda: copy
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait
