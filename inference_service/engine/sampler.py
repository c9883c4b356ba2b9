"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
from torch import Tensor

from inference_service.core.sequence import Sequence, Token
from inference_service.engine.logits import shape, shapes
from inference_service.engine.logprobs import report
from inference_service.kernels.sampling import RowParams, draw


def sample(logits: Tensor, seqs: Seq[Sequence]) -> list[Token]:
    """Draw one token per row of logits [N, vocab]; row i belongs to seqs[i].

    A draw depends on the request's seed and on how many tokens it has, and on nothing else in the batch, so the
    same request gives the same answer in any company and after a preemption, and for the same logits on every
    backend. Log probabilities are those of logits, before whatever the request does to them.
    """
    ids = logits.argmax(dim=-1).tolist()
    impossible = set()
    for row, seq in enumerate(seqs):
        if shapes(seq) or not seq.sampling.greedy:
            own = (shape(logits[row], seq) if shapes(seq) else logits[row].float()).numpy(force=True)
            ids[row] = draw(own, row_params(seq))
            if shapes(seq) and np.isneginf(own).all():
                impossible.add(row)
    tokens = [_token(logits, row, ids[row], seq) for row, seq in enumerate(seqs)]
    for row in impossible:
        tokens[row] = replace(tokens[row], impossible=True)
    return tokens


def row_params(seq: Sequence) -> RowParams:
    """How the next token of a sequence is drawn."""
    params = seq.sampling
    return RowParams(
        params.temperature, params.top_k, params.top_p, params.min_p, params.seed, seq.num_generated
    )


def _token(logits: Tensor, row: int, token: int, seq: Sequence) -> Token:
    count = seq.sampling.logprobs
    return Token(token) if count is None else report(logits[row : row + 1], [token], count)[0]
