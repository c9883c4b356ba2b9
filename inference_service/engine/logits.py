"""What a request may do to its logits before a token is drawn from them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.history import History, history_of


def shapes(seq: Sequence) -> bool:
    """Return whether the next token of a sequence is drawn from other logits than the model's."""
    params = seq.sampling
    return bool(
        seq.grammar is not None
        or params.logit_bias
        or params.penalizes
        or params.restricts
        or seq.num_generated < params.min_tokens
    )


def shape(logits: Tensor, seq: Sequence) -> Tensor:
    """Return the logits [vocab], in float32, that the next token of a sequence is drawn from.

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
        mask = torch.from_numpy(_forbidden(seq, len(logits))).to(logits.device)
        logits.masked_fill_(mask, -torch.inf)
    if seq.num_generated < seq.sampling.min_tokens:
        stops = torch.tensor(sorted(seq.sampling.stop_token_ids), dtype=torch.int64, device=logits.device)
        going_on = logits.index_fill(0, stops, -torch.inf)
        if going_on.isfinite().any():
            return going_on
    return logits


def _forbidden(seq: Sequence, vocab: int) -> npt.NDArray[np.bool_]:
    """Return which tokens [vocab] may not come."""
    allowed = np.ones(vocab, np.bool_)
    for mask in (None if seq.grammar is None else seq.grammar.mask(), seq.sampling.allowed_token_ids):
        if mask is not None:
            bits = np.frombuffer(mask, np.uint8)
            allowed &= np.unpackbits(bits, None, vocab, "little").view(np.bool_)
    for length, words in seq.sampling.bad_words.items():
        if length <= seq.num_known:
            allowed[list(words.get(tuple(seq.tokens[len(seq.tokens) - length :]), ()))] = False
    return ~allowed


def _penalize(logits: Tensor, history: History, params: SamplingParams) -> None:
    seen, counts = history.tokens.to(logits.device), history.counts.to(logits.device)
    found, factor = logits[seen], params.repetition_penalty
    found = torch.where(found > 0, found / factor, found * factor)
    logits[seen] = found - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
