"""Log probabilities: the model's own, or those that a token is drawn by."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Token

# Rows whose logits [PIECE, vocab] are held in float32 at once: 39 MB for 152 thousand tokens.
PIECE = 64


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
