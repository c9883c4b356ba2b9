"""The same draw on the host, in float64: where logits lie there, and for rows that a request shapes.

Noise is a function of seed, step and token, so it is computed for those tokens alone that can still win.
"""

from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference_service.core.constraint import unpacked
from inference_service.engine.kernels.sampling.layout import RowParams

REACH: Final = 27.0
"""More than the largest noise, log(2^33), is above the smallest, -log(log(2^33)): 22.88 and -3.13."""
PIECE: Final = 8192
"""Counters at once: smaller pieces cost calls, larger ones leave the cache."""

Logits = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]


Drawn: TypeAlias = tuple[list[int], list[float]]
"""A token of each row, and the row's largest logit, which is NaN where the row has any.

The token is NO_TOKEN where no token may come that has a logit above -inf.
"""
NO_TOKEN: Final = -1


def draw_rows(logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
    """Draw a token for each row of logits [N, vocab]."""
    best = logits.argmax(dim=-1, keepdim=True)
    ids, tops = best[:, 0].tolist(), logits.gather(1, best)[:, 0].tolist()
    for row, params in enumerate(rows):
        shaped = params.allowed is not None or params.edits is not None
        if params.temperature or shaped:
            own = shape(logits[row].float().numpy(force=True), params)
            ids[row] = draw(own, params) if not shaped or np.fmax.reduce(own) > -np.inf else NO_TOKEN
    return ids, tops


def scores(logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return ids [N], their log probabilities and ranks in rows of logits [N, vocab], and the best of each row.

    The best are tokens and log probabilities [N, count]. All are on the device of the logits.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, ids.long()[:, None])
    best = logprobs.topk(count)
    return ids, own[:, 0], (logprobs > own).sum(dim=-1) + 1, best.indices, best.values


def shape(logits: Logits, params: RowParams) -> Logits:
    """Return the logits [vocab] that a token is drawn from: edited, and -inf where no token may come."""
    edits = params.edits
    if edits is not None:
        logits = logits.copy()
        seen, counts, factor = np.array(edits.tokens), np.array(edits.counts), edits.repetition
        found = logits[seen]
        found = np.where(found > 0, found / factor, found * factor)
        answered = (counts > 0).astype(np.float32)
        logits[seen] = found - edits.presence * answered - edits.frequency * counts
        np.add.at(logits, np.array(edits.added_to), np.array(edits.added))
    if params.allowed is not None:
        logits = np.where(unpacked(params.allowed, len(logits)), logits, np.float32(-np.inf))
    return logits


def draw(logits: Logits, params: RowParams) -> int:
    """Draw a token by logits [vocab]; NaN counts as -inf, and of a row without any other the answer is 0."""
    best = np.fmax.reduce(logits)
    if not best > -np.inf:
        return 0
    if params.temperature == 0.0:
        return int((logits == best).argmax())
    kept = _support(logits, best, params) & (logits >= best - np.float32(REACH / params.sharpness))
    values = np.full((-(-len(logits) // 4), 4), -np.inf, dtype=np.float32)
    np.copyto(values.reshape(-1)[: len(logits)], logits, where=kept)
    counters = np.flatnonzero((values > -np.inf).view(np.uint32))
    score, token = -np.inf, 0
    for start in range(0, len(counters), PIECE):
        own = counters[start : start + PIECE]
        scores = values[own] * params.sharpness + noise(params, own)
        place = int(scores.argmax())
        if scores.flat[place] > score:
            score, token = scores.flat[place], 4 * int(own[place // 4]) + place % 4
    return token


def noise(params: RowParams, counters: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the Gumbel noise [counters, 4] of the tokens 4 i to 4 i + 3 of each counter i."""
    seed = params.seed % 2**64
    first = counters.astype(np.uint64)
    second, rest = np.full_like(first, params.num_generated), np.zeros_like(first)
    words = philox((first, second, rest, rest), (seed % 2**32, seed >> 32))
    # 1 - u of u = (word + 1/2) / 2^32 has all its digits; then -log(-log(1 - u)), in place.
    out = np.subtract(2.0**32 - 0.5, np.stack(words, axis=1))
    out *= 2.0**-32
    for _ in range(2):
        np.log(out, out=out)
        np.negative(out, out=out)
    return out


def philox(counter: Sequence[Words], key: tuple[int, int], rounds: int = 10) -> list[Words]:
    """Philox-4x32: four words of 32 bits per counter of four words.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = (words.copy() for words in counter)
    a, b = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    for _ in range(rounds):
        np.multiply(c0, np.uint64(0xD2511F53), out=a)
        np.multiply(c2, np.uint64(0xCD9E8D57), out=b)
        np.right_shift(b, np.uint64(32), out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.right_shift(a, np.uint64(32), out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        np.bitwise_and(b, np.uint64(2**32 - 1), out=c1)
        np.bitwise_and(a, np.uint64(2**32 - 1), out=c3)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def _support(logits: Logits, best: np.float32, params: RowParams) -> Mask:
    """Return which tokens take part: min-p, then top-k, then top-p of what is left."""
    kept = logits >= best - np.float32(params.span) if params.min_p else logits > -np.inf
    if params.top_k and params.top_k < np.count_nonzero(kept):
        kept = _first(logits, kept, np.partition(logits[kept], -params.top_k)[-params.top_k], params.top_k)
    if params.top_p < 1.0:
        ranked = np.sort(logits[kept])[::-1]
        masses = np.exp((ranked.astype(np.float64) - best) * params.sharpness)
        total = masses.cumsum()
        count = max(1, int(np.count_nonzero(total - masses < params.top_p * total[-1])))
        kept = _first(logits, kept, ranked[count - 1], count)
    return kept


def _first(logits: Logits, kept: Mask, cut: np.float32, count: int) -> Mask:
    """Keep count tokens: those above a cut, and of those that equal it the lowest."""
    first: Mask = kept & (logits > cut)
    first[np.flatnonzero(kept & (logits == cut))[: count - np.count_nonzero(first)]] = True
    return first
