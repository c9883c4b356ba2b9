"""The draw of tokens from logits on the host: the changes of requests to them, and log probabilities.

`shaping` gives the changes to the sampler on the device as data, which must compute the same.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence as Seq
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from inference_service.core.constraint import common
from inference_service.core.sampling import LogprobsMode, SamplingParams
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.kernels.sampling import NO_TOKEN, Drawn, Edits, RowParams, draw_rows, scores
from inference_service.engine.kernels.sampling.host import shape as shape_row

SCORED_ROWS = 64
"""Rows whose logits [SCORED_ROWS, vocab] are held in float32 at once: 39 MB for 152 thousand tokens."""


def processed(shaped: Tensor, ids: Tensor, rows: Seq[SamplingParams]) -> Tensor:
    """Return the logits [N, vocab], in float32, of the distributions that ids [N] were drawn from.

    shaped are logits with penalties, bias and masks: what is left is temperature, and the tokens that min-p,
    top-k and top-p leave out. A drawn token always takes part: at the edge of top-p, the draw rounds otherwise.
    """
    logits = shaped.to(torch.float32, copy=True)
    for row, params in enumerate(rows):
        if params.greedy:
            continue
        logits[row] /= params.temperature
        if params.min_p or params.top_k or params.top_p < 1.0:
            out = ~_takes_part(logits[row], params)
            out[ids[row]] = False
            logits[row].masked_fill_(out, -torch.inf)
    return logits


def _takes_part(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return which tokens [vocab] min-p, top-k and top-p leave, of logits that temperature has divided."""
    ranked, order = torch.softmax(logits, dim=-1).sort(descending=True, stable=True)
    taking = ranked >= params.min_p * ranked[0]
    if params.top_k:
        taking[params.top_k :] = False
    ranked = ranked.where(taking, 0.0)
    before = ranked.cumsum(0) - ranked
    taking &= before < params.top_p * ranked.sum()
    return torch.empty_like(taking).scatter_(0, order, taking)


def tokens_of(scored: Seq[Tensor]) -> list[Token]:
    """Make tokens of scores; tensors of the host are taken as they are, others are waited for."""
    rows = zip(*(tensor.tolist() for tensor in scored), strict=True)
    return [
        Token(token, logprob, tuple(zip(ids, values, strict=True)), rank)
        for token, logprob, rank, ids, values in rows
    ]


Draw = Callable[[Tensor, Seq[RowParams]], Drawn]
"""Draws a token for each row of logits [N, vocab], as `draw_rows` does."""
Score = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
"""Scores tokens, as `kernels.sampling.scores` does."""


def sample(
    logits: Tensor,
    seqs: Seq[Sequence],
    ahead: Seq[int] | None = None,
    draw: Draw = draw_rows,
    score: Score = scores,
) -> list[Token]:
    """Draw one token per row of logits [N, vocab]; row i belongs to seqs[i], whose tokens are known.

    With ahead, the draw is the one that comes so many tokens later: those in between are drafted.

    A draw depends on the request's seed and on how many tokens it has, and on nothing else in the batch, so the
    same request gives the same answer in every batch and after a preemption, and for the same logits on every
    backend. Log probabilities are those of logits, before whatever the request does to them, or where it asks
    for it those that the token was drawn by.
    """
    later = ahead or [0] * len(seqs)
    ids, tops = _draw_ids(logits, seqs, later, draw)
    tokens = [Token(max(token, 0), impossible=token == NO_TOKEN) for token in ids]
    for count, mode, rows in scored_rows(seqs, 1):
        drawn = torch.tensor([tokens[row].id for row in rows], device=logits.device)
        if mode == "processed":
            shaped = torch.stack([shape(logits[row], seqs[row], later[row]) for row in rows])
            own = processed(shaped, drawn, [seqs[row].sampling for row in rows])
        else:
            own = logits if len(rows) == len(seqs) else logits[rows]
        for row, scored in zip(rows, tokens_of(score(own, drawn, count)), strict=True):
            scored.impossible = tokens[row].impossible
            tokens[row] = scored
    return marked(tokens, tops)


def _draw_ids(logits: Tensor, seqs: Seq[Sequence], later: Seq[int], draw: Draw) -> Drawn:
    """Draw ids; a sequence below its min_tokens draws stop tokens where no other token is left."""
    ids, tops = draw(logits, [_drawing(seq, more) for seq, more in zip(seqs, later, strict=True)])
    again = [
        row
        for row, (seq, token) in enumerate(zip(seqs, ids, strict=True))
        if token == NO_TOKEN and seq.num_known < seq.sampling.min_tokens
    ]
    if again:
        stopping, _ = draw(logits[again], [_drawing(seqs[row], later[row], may_stop=True) for row in again])
        for row, token in zip(again, stopping, strict=True):
            ids[row] = token
    return ids, tops


def scored_rows(seqs: Seq[Sequence], processed: int) -> Iterator[tuple[int, LogprobsMode, list[int]]]:
    """Yield rows whose tokens are scored together, with how many others beside each token, and the mode.

    Of rows with processed log probabilities, which need a copy of their logits, so many at most are together.
    """
    groups: dict[tuple[int, LogprobsMode], list[int]] = {}
    for row, seq in enumerate(seqs):
        if seq.sampling.logprobs is not None:
            groups.setdefault((seq.sampling.logprobs, seq.sampling.logprobs_mode), []).append(row)
    for (count, mode), rows in groups.items():
        size = len(rows) if mode == "raw" else processed
        for first in range(0, len(rows), size):
            yield count, mode, rows[first : first + size]


def marked(tokens: list[Token], tops: Seq[float]) -> list[Token]:
    """Mark and return tokens of rows with these largest logits; NaN is the largest of a row that has any."""
    if not all(map(math.isfinite, tops)):
        for token, top in zip(tokens, tops, strict=True):
            token.finite = math.isfinite(top)
    return tokens


def row_params(
    seq: Sequence, generated: int, allowed: bytes | None = None, edits: Edits | None = None
) -> RowParams:
    """Return the parameters of a sequence's draw after so many tokens of its answer."""
    params = seq.sampling
    return RowParams(
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed, generated, allowed, edits
    )


def _drawing(seq: Sequence, ahead: int, *, may_stop: bool = False) -> RowParams:
    """Return the parameters of a draw on the host, behind so many drafted tokens.

    First the penalties (repetition as Hugging Face and vLLM define it, then OpenAI's two), then the bias, then
    what may not come: what grammar and request do not allow, which can be all, and stop tokens before
    min_tokens unless they may.
    """
    if not shapes(seq, seq.num_known):
        return row_params(seq, seq.num_known + ahead)
    allowed = seq.sampling.allowed_token_ids
    if seq.grammar is not None:
        mask = seq.grammar.mask(ahead)
        allowed = mask if allowed is None else common(mask, allowed)
    edits = None
    if seq.looks_back(seq.num_known):
        edits = history_of(seq).edits
        if out := _forbidden(seq, may_stop=may_stop):
            added = edits.added + array("f", [-math.inf]) * len(out)
            edits = replace(edits, added_to=edits.added_to + out, added=added)
    return row_params(seq, seq.num_known + ahead, allowed, edits)


def _forbidden(seq: Sequence, *, may_stop: bool) -> array[int]:
    """Return tokens that would complete a bad word, and stop tokens where these may not come yet."""
    out, tokens = array("i"), seq.progress.tokens
    for length, words in seq.sampling.bad_words.items():
        if length <= seq.num_known:
            out.extend(words.get(tuple(tokens[len(tokens) - length :]), ()))
    if seq.num_known < seq.sampling.min_tokens and not may_stop:
        out.extend(seq.sampling.stop_token_ids)
    return out


def shapes(seq: Sequence, generated: int) -> bool:
    """Return whether a token is not drawn from the model's logits, after so many others of the answer."""
    return seq.grammar is not None or seq.looks_back(generated)


def shape(logits: Tensor, seq: Sequence, ahead: int = 0) -> Tensor:
    """Return the logits [vocab], in float32, that the next token of a sequence is drawn from.

    With ahead, the token is the one behind so many drafted ones, at which nothing but a grammar looks.
    """
    row = logits.float().numpy(force=True)
    shaped = shape_row(row, _drawing(seq, ahead))
    if not np.isfinite(shaped).any():
        shaped = shape_row(row, _drawing(seq, ahead, may_stop=True))
    return torch.from_numpy(shaped).to(logits.device)


class TokenHistory:
    """The distinct tokens of a sequence and their counts, and its bias, as a draw takes them."""

    def __init__(self, seq: Sequence) -> None:
        params, bias = seq.sampling, seq.sampling.logit_bias
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        self.edits = Edits(array("i"), array("f"), *penalties, array("i", bias), array("f", bias.values()))
        self._places: dict[int, int] = {}
        self._known = 0

    def follow(self, seq: Sequence) -> None:
        """Take in the tokens that came since the last time."""
        tokens, counts = self.edits.tokens, self.edits.counts
        for at, token in enumerate(seq.progress.tokens[self._known :], self._known):
            place = self._places.setdefault(token, len(tokens))
            if place == len(tokens):
                tokens.append(token)
                counts.append(0.0)
            counts[place] += at >= seq.num_prompt
        self._known = len(seq.progress.tokens)


_histories: WeakKeyDictionary[Sequence, TokenHistory] = WeakKeyDictionary()


def history_of(seq: Sequence) -> TokenHistory:
    """Return the history of a sequence, up to its last token; it goes when the sequence goes."""
    if seq not in _histories:
        _histories[seq] = TokenHistory(seq)
    history = _histories[seq]
    if seq.sampling.penalizes:
        history.follow(seq)
    return history
