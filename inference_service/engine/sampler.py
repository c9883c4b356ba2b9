"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from inference_service.core.sequence import Sequence, Token
from inference_service.engine.logits import shape, shapes
from inference_service.engine.logprobs import report


def sample(logits: Tensor, seqs: Seq[Sequence]) -> list[Token]:
    """Draw one token per row of logits [N, vocab]; row i belongs to seqs[i].

    A draw depends on the request's seed and on how many tokens it has, and on nothing else in the batch, so the
    same request gives the same answer in any company and after a preemption. Log probabilities are those of
    logits, before whatever the request does to them.
    """
    ids = logits.argmax(dim=-1).tolist()
    for row, seq in enumerate(seqs):
        if shapes(seq) or not seq.sampling.greedy:
            ids[row] = _draw(logits[row], seq)
    return [_token(logits, row, ids[row], seq) for row, seq in enumerate(seqs)]


def _draw(logits: Tensor, seq: Sequence) -> int:
    """Temperature, then min-p, top-k, top-p, then a draw by the exponential race (Gumbel-max)."""
    params = seq.sampling
    logits = shape(logits, seq) if shapes(seq) else logits.float()
    if params.greedy:
        return int(logits.argmax())
    probs = torch.softmax(logits / params.temperature, dim=-1)
    if params.min_p:
        probs = probs.where(probs >= params.min_p * probs.max(), 0.0)
    generator = torch.Generator().manual_seed((params.seed * 0x9E3779B97F4A7C15 + seq.num_generated) % 2**63)
    race = torch.empty(len(probs)).exponential_(generator=generator).to(probs.device)
    if params.top_k and params.top_k < len(probs):
        ranked, order = probs.topk(params.top_k)
    elif params.top_p < 1.0:
        ranked, order = probs.sort(descending=True)
    else:
        return int((probs / race).argmax())
    if params.top_p < 1.0:
        before = ranked.cumsum(0) - ranked
        ranked = ranked.where(before < params.top_p * ranked.sum(), 0.0)
    return int(order[(ranked / race[order]).argmax()])


def _token(logits: Tensor, row: int, token: int, seq: Sequence) -> Token:
    count = seq.sampling.logprobs
    return Token(token) if count is None else report(logits[row : row + 1], [token], count)[0]
