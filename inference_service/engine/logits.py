"""What a request may do to its logits before a token is drawn from them."""

from __future__ import annotations

import numpy as np
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
        or seq.num_generated < params.min_tokens
    )


def shape(logits: Tensor, seq: Sequence) -> Tensor:
    """Return the logits [vocab], in float32, that the next token of a sequence is drawn from.

    First the penalties (repetition as Hugging Face and vLLM define it, then OpenAI's two), then the bias, then
    what may not come: what the grammar does not allow, and stop tokens before min_tokens unless nothing else is
    left.
    """
    logits = logits.to(torch.float32, copy=True)
    history = history_of(seq)
    if seq.sampling.penalizes:
        _penalize(logits, history, seq.sampling)
    if len(history.bias):
        logits[history.bias_tokens.to(logits.device)] += history.bias.to(logits.device)
    if seq.grammar is not None:
        allowed = np.unpackbits(np.frombuffer(seq.grammar.mask(), np.uint8), bitorder="little")
        mask = torch.from_numpy(allowed[: len(logits)]).to(logits.device)
        logits.masked_fill_(mask == 0, -torch.inf)
    if seq.num_generated < seq.sampling.min_tokens:
        stops = torch.tensor(sorted(seq.sampling.stop_token_ids), dtype=torch.int64, device=logits.device)
        going_on = logits.index_fill(0, stops, -torch.inf)
        if going_on.isfinite().any():
            return going_on
    return logits


def _penalize(logits: Tensor, history: History, params: SamplingParams) -> None:
    seen, counts = history.tokens.to(logits.device), history.counts.to(logits.device)
    found, factor = logits[seen], params.repetition_penalty
    found = torch.where(found > 0, found / factor, found * factor)
    logits[seen] = found - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
