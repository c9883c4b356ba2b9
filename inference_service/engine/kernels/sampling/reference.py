"""The reference of the kernels, in plain torch and numpy: with sorting, row by row, in float64."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.engine.kernels.sampling.host import philox
from inference_service.engine.kernels.sampling.layout import RowParams


def sample(logits: Tensor, rows: Sequence[RowParams]) -> Tensor:
    """int64 [len(rows)]: one token per row of logits."""
    drawn = [_draw(row, params) for row, params in zip(logits.double(), rows, strict=False)]
    return torch.tensor(drawn, dtype=torch.int64)


def distribution(logits: Tensor, params: RowParams) -> Tensor:
    """float64 [V]: the probabilities of the tokens of one row that take part, before they are normalised."""
    logits = logits.double()
    probs = torch.softmax(logits / params.temperature, dim=-1)
    ranked, order = probs.sort(descending=True, stable=True)
    ranked = ranked.where(ranked >= params.min_p * ranked[0], 0.0)
    if params.top_k:
        ranked[params.top_k :] = 0.0
    before = ranked.cumsum(0) - ranked
    ranked = ranked.where(before < params.top_p * ranked.sum(), 0.0)
    return torch.zeros_like(probs).scatter_(0, order, ranked)


def noise(params: RowParams, vocab: int) -> npt.NDArray[np.float64]:
    """[vocab]: the Gumbel noise of each token."""
    counters = np.arange(-(-vocab // 4), dtype=np.uint64)
    zeros = np.zeros_like(counters)
    seed = params.seed % 2**64
    words = philox(
        (counters, zeros + np.uint64(params.num_generated), zeros, zeros), (seed % 2**32, seed >> 32)
    )
    bits = np.stack(words, axis=1).reshape(-1)[:vocab]
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def _draw(logits: Tensor, params: RowParams) -> int:
    if params.temperature == 0.0:
        return int(logits.argmax())
    scores = logits / params.temperature + torch.from_numpy(noise(params, len(logits)))
    return int(scores.where(distribution(logits, params) > 0, -torch.inf).argmax())
