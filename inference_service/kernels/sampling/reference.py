"""What the kernels compute, in plain torch and numpy: with sorting, row by row, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.kernels.sampling.layout import RowParams


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


def philox(
    counter: Sequence[npt.NDArray[np.uint64]], key: tuple[int, int], rounds: int = 10
) -> list[npt.NDArray[np.uint64]]:
    """Philox-4x32: four words of 32 bits per counter of four words.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = np.uint64(2**32 - 1)
    for _ in range(rounds):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def _draw(logits: Tensor, params: RowParams) -> int:
    if params.temperature == 0.0:
        return int(logits.argmax())
    scores = logits / params.temperature + torch.from_numpy(noise(params, len(logits)))
    return int(scores.where(distribution(logits, params) > 0, -torch.inf).argmax())
