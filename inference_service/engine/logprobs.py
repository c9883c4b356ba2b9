"""Log probabilities: the model's own, whatever is done to its logits before a token is drawn."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from inference_service.core.sequence import Sequence, Token

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


def tokens_of(scored: Seq[Tensor]) -> list[Token]:
    """Make tokens of scores; tensors of the host are taken as they are, others are waited for."""
    rows = zip(*(tensor.tolist() for tensor in scored), strict=True)
    return [
        Token(token, logprob, tuple(zip(ids, values, strict=True)), rank)
        for token, logprob, rank, ids, values in rows
    ]


def score_prompt(seq: Sequence, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> None:
    """Score the next len(hidden) tokens of a prompt, each by the row before it; hidden is [N, hidden size]."""
    count = seq.sampling.prompt_logprobs or 0
    for start in range(0, len(hidden), PIECE):
        rows = hidden[start : start + PIECE]
        first = len(seq.prompt_scores)
        seq.prompt_scores += report(head(rows), seq.tokens[first : first + len(rows)], count)
