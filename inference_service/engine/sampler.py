"""The draw of tokens from logits on the host: the changes of requests to them, and log probabilities.

`shaping` gives the changes to the sampler on the device as data, which must compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence as Seq
from dataclasses import replace
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.core.constraint import unpacked
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, Token
from inference_service.kernels.sampling import NO_TOKEN, Drawn, RowParams, draw_rows

SCORED_ROWS = 64
"""Rows whose logits [SCORED_ROWS, vocab] are held in float32 at once: 39 MB for 152 thousand tokens."""


def report(logits: Tensor, tokens: Seq[int], count: int) -> list[Token]:
    """Return tokens with their log probabilities under logits [N, vocab], and the count best of each row."""
    return tokens_of(scores(logits, torch.tensor(tokens, device=logits.device), count))


def scores(logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return, on the device, what `tokens_of` makes tokens of: of ids [N] and of each row's count best."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, ids.long()[:, None])
    best = logprobs.topk(count)
    return ids, own[:, 0], (logprobs > own).sum(dim=-1) + 1, best.indices, best.values


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


GREEDY: Final = RowParams()


def sample(
    logits: Tensor, seqs: Seq[Sequence], ahead: Seq[int] | None = None, draw: Draw = draw_rows
) -> list[Token]:
    """Draw one token per row of logits [N, vocab]; row i belongs to seqs[i], whose tokens are known.

    With ahead, the draw is the one that comes so many tokens later: those in between are drafted.

    A draw depends on the request's seed and on how many tokens it has, and on nothing else in the batch, so the
    same request gives the same answer in every batch and after a preemption, and for the same logits on every
    backend. Log probabilities are those of logits, before whatever the request does to them, or where it asks
    for it those that the token was drawn by.
    """
    later = ahead or [0] * len(seqs)
    params = [row_params(seq, seq.num_known + more) for seq, more in zip(seqs, later, strict=True)]
    shaped: dict[int, Tensor] = {}
    for row, (seq, more) in enumerate(zip(seqs, later, strict=True)):
        if looks_back(seq, seq.num_known) or (seq.grammar is not None and _scores_processed(seq)):
            shaped[row] = shape(logits[row], seq, more)
        elif seq.grammar is not None:
            params[row] = replace(params[row], allowed=seq.grammar.mask(more))
    ids, tops = draw(logits, [GREEDY if row in shaped else each for row, each in enumerate(params)])
    if shaped:
        drawn, best = draw(torch.stack([*shaped.values()]), [params[row] for row in shaped])
        for row, token, top in zip(shaped, drawn, best, strict=True):
            ids[row] = NO_TOKEN if top == -math.inf else token
    tokens = [
        _token(logits[row], shaped.get(row, logits[row]), max(ids[row], 0), seq) for row, seq in enumerate(seqs)
    ]
    for row, token_id in enumerate(ids):
        if token_id == NO_TOKEN:
            tokens[row] = tokens[row]._replace(impossible=True)
    return marked(tokens, tops)


def marked(tokens: list[Token], tops: Seq[float]) -> list[Token]:
    """Return the tokens of rows with these largest logits; NaN is the largest of a row that has any."""
    if all(map(math.isfinite, tops)):
        return tokens
    return [token._replace(finite=math.isfinite(top)) for token, top in zip(tokens, tops, strict=True)]


def row_params(seq: Sequence, generated: int) -> RowParams:
    """Return the parameters of a sequence's draw after so many tokens of its answer."""
    params = seq.sampling
    return RowParams(params.temperature, params.top_k, params.top_p, params.min_p, params.seed, generated)


def _token(logits: Tensor, shaped: Tensor, token: int, seq: Sequence) -> Token:
    """Return a token, scored as it is asked for: by logits [vocab], or by what was made of them, shaped."""
    count = seq.sampling.logprobs
    if count is None:
        return Token(token)
    if _scores_processed(seq):
        logits = processed(shaped[None], torch.tensor([token], device=logits.device), [seq.sampling])[0]
    return report(logits[None], [token], count)[0]


def _scores_processed(seq: Sequence) -> bool:
    return seq.sampling.logprobs is not None and seq.sampling.logprobs_mode == "processed"


def shapes(seq: Sequence, generated: int) -> bool:
    """Return whether a token is not drawn from the model's logits, after so many others of the answer."""
    return seq.grammar is not None or looks_back(seq, generated)


def looks_back(seq: Sequence, generated: int) -> bool:
    """Return whether more than a grammar shapes it: what may need to know all tokens before."""
    params = seq.sampling
    return bool(params.logit_bias or params.penalizes or params.restricts or generated < params.min_tokens)


def shape(logits: Tensor, seq: Sequence, ahead: int = 0) -> Tensor:
    """Return the logits [vocab], in float32, that the next token of a sequence is drawn from.

    With ahead, the token is the one behind so many drafted ones, at which nothing but a grammar looks.

    First the penalties (repetition as Hugging Face and vLLM define it, then OpenAI's two), then the bias, then
    what may not come: what grammar and request do not allow, which can be all, and stop tokens before
    min_tokens unless nothing else is left.
    """
    logits = logits.to(torch.float32, copy=True)
    history = history_of(seq)
    if seq.sampling.penalizes:
        _penalize(logits, history, seq.sampling)
    if len(history.bias):
        logits[history.bias_tokens.to(logits.device)] += history.bias.to(logits.device)
    if seq.grammar is not None or seq.sampling.restricts:
        mask = torch.from_numpy(_forbidden(seq, len(logits), ahead)).to(logits.device)
        logits.masked_fill_(mask, -torch.inf)
    if seq.num_known < seq.sampling.min_tokens:
        stops = torch.tensor(sorted(seq.sampling.stop_token_ids), dtype=torch.int64, device=logits.device)
        going_on = logits.index_fill(0, stops, -torch.inf)
        if going_on.isfinite().any():
            return going_on
    return logits


def _forbidden(seq: Sequence, vocab: int, ahead: int) -> npt.NDArray[np.bool_]:
    """Return which tokens [vocab] may not come."""
    allowed = np.ones(vocab, np.bool_)
    for mask in (None if seq.grammar is None else seq.grammar.mask(ahead), seq.sampling.allowed_token_ids):
        if mask is not None:
            allowed &= unpacked(mask, vocab)
    for length, words in seq.sampling.bad_words.items():
        if length <= seq.num_known:
            allowed[list(words.get(tuple(seq.progress.tokens[len(seq.progress.tokens) - length :]), ()))] = (
                False
            )
    return ~allowed


def _penalize(logits: Tensor, history: TokenHistory, params: SamplingParams) -> None:
    seen, counts = history.tokens.to(logits.device), history.counts.to(logits.device)
    found, factor = logits[seen], params.repetition_penalty
    found = torch.where(found > 0, found / factor, found * factor)
    logits[seen] = found - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts


class TokenHistory:
    """The distinct tokens of a sequence and their counts, and its bias, as tensors."""

    def __init__(self, seq: Sequence) -> None:
        self.tokens = torch.empty(0, dtype=torch.int64)
        """[D]: the distinct tokens of prompt and answer."""
        self.counts = torch.empty(0, dtype=torch.float32)
        """[D]: how often each occurs in the answer."""
        bias = seq.sampling.logit_bias
        self.bias_tokens = torch.tensor(list(bias), dtype=torch.int64)
        self.bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._places: dict[int, int] = {}
        self._known = 0

    def follow(self, seq: Sequence) -> None:
        """Take in the tokens that came since the last time."""
        progress = seq.progress
        new = [token for token in dict.fromkeys(progress.tokens[self._known :]) if token not in self._places]
        if new:
            self._places |= {token: len(self._places) + place for place, token in enumerate(new)}
            self.tokens = torch.cat([self.tokens, torch.tensor(new)])
            self.counts = torch.cat([self.counts, torch.zeros(len(new))])
        for token in progress.tokens[max(self._known, seq.num_prompt) :]:
            self.counts[self._places[token]] += 1
        self._known = len(progress.tokens)


_histories: WeakKeyDictionary[Sequence, TokenHistory] = WeakKeyDictionary()


def history_of(seq: Sequence) -> TokenHistory:
    """Return the history of a sequence, up to its last token; it goes when the sequence goes."""
    if seq not in _histories:
        _histories[seq] = TokenHistory(seq)
    history = _histories[seq]
    if seq.sampling.penalizes:
        history.follow(seq)
    return history
