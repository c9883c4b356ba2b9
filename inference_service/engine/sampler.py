"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from inference_service.core.sequence import Sequence, Token


def sample(logits: Tensor, seqs: Seq[Sequence]) -> list[Token]:
    """Draw one token per row of logits [N, vocab]; row i belongs to seqs[i].

    A draw depends on the request's seed and on how many tokens it has, and on nothing else in the batch, so the
    same request gives the same answer in any company and after a preemption.
    """
    ids = logits.argmax(dim=-1).tolist()
    for row, seq in enumerate(seqs):
        if not seq.sampling.greedy:
            ids[row] = _draw(logits[row].float(), seq)
    return [_token(logits[row], token, seq) for row, (token, seq) in enumerate(zip(ids, seqs, strict=True))]


def _draw(logits: Tensor, seq: Sequence) -> int:
    """Temperature, then top-k, then top-p, then a draw by the exponential race (Gumbel-max)."""
    params = seq.sampling
    probs = torch.softmax(logits / params.temperature, dim=-1)
    if params.top_k and params.top_k < len(probs):
        kept = probs.topk(params.top_k)
        probs = torch.zeros_like(probs).scatter_(0, kept.indices, kept.values)
    if params.top_p < 1.0:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(0) - ranked
        probs = torch.zeros_like(probs).scatter_(
            0, order, ranked.where(before < params.top_p * ranked.sum(), 0.0)
        )
    generator = torch.Generator().manual_seed((params.seed * 0x9E3779B97F4A7C15 + seq.num_generated) % 2**63)
    race = torch.empty(len(probs)).exponential_(generator=generator).to(probs.device)
    return int((probs / race).argmax())


def _token(logits: Tensor, token: int, seq: Sequence) -> Token:
    count = seq.sampling.logprobs
    if count is None:
        return Token(token)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = logprobs.topk(count)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), top)
