"""Draws on the host: all 64 bits of a seed count, no two streams share noise, and the distribution is right."""

from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.sampler import sample
from inference_service.kernels.sampling import RowParams, draw, reference
from inference_service.kernels.sampling.host import REACH, noise

CHI_SQUARE = {4: 23.5, 7: 29.9}
"""Critical values by degrees of freedom: exceeded once in 10000 honest experiments."""


@cache
def answer(seed: int, steps: int = 16) -> list[int]:
    """The tokens that a request of a seed is given when all of 1000 tokens are equally likely."""
    seq = Sequence("request", [0], SamplingParams(temperature=1.0, seed=seed))
    for _ in range(steps):
        (token,) = sample(torch.zeros(1, 1000), [seq])
        seq.progress.tokens.append(token.id)
    return seq.progress.tokens[1:]


@pytest.mark.parametrize("other", [1 + 2**32, 1 + 2**63, 1 - 2**63, -1, 2])
def test_every_bit_of_a_seed_counts(other: int) -> None:
    """Seeds of 64 bits, signed or not, give different answers."""
    assert answer(1) == answer.__wrapped__(1)
    assert sum(mine == theirs for mine, theirs in zip(answer(1), answer(other), strict=True)) < 4


def test_a_negative_seed_is_the_unsigned_one_of_the_same_bits() -> None:
    """A negative seed of int64 is the unsigned seed of uint64 with the same bits."""
    assert answer(-1) == answer(2**64 - 1)


def test_no_two_steps_of_any_seeds_share_noise() -> None:
    """No two words of noise in a row occur twice, over near and odd seeds and steps."""
    odd = 0x9E3779B97F4A7C15
    seeds = [0, 1, 2, 1 + 2**32, 2**63, -1, odd, -odd, odd + 1, 2**32 - odd]
    rows = [RowParams(1.0, seed=seed, num_generated=step) for seed in seeds for step in range(8)]
    words = np.stack([noise(row, np.arange(250)).reshape(-1) for row in rows])
    pairs = words[:, :-1] + 1j * words[:, 1:]
    assert len(np.unique(pairs)) == pairs.size


def chi_square(counts: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> float:
    """The statistic of counts against probabilities."""
    expected = probs / probs.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("varied", "params"),
    [("seed", RowParams(1.3, seed=11)), ("num_generated", RowParams(1.3, top_k=5, seed=11))],
    ids=["all", "five"],
)
def test_draws_follow_the_distribution(varied: str, params: RowParams) -> None:
    """3000 draws over steps or over seeds: chi-square, which another temperature would not pass."""
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.1], dtype=np.float32)
    tokens = [draw(logits, replace(params, **{varied: value})) for value in range(3000)]
    counts = np.bincount(tokens, minlength=8)
    for other, passes in ((params, True), (replace(params, temperature=0.9), False)):
        probs = reference.distribution(torch.from_numpy(logits), other).numpy()
        taking = probs > 0
        assert counts[~taking].sum() == 0
        assert (chi_square(counts[taking], probs[taking]) < CHI_SQUARE[int(taking.sum()) - 1]) is passes


def test_what_cannot_win_is_out_of_reach_of_all_noise() -> None:
    """The noise of the smallest and of the largest word, between which all others lie."""
    lowest, highest = (-np.log(-np.log1p(-(word + 0.5) / 2**32)) for word in (0, 2**32 - 1))
    assert abs(highest - lowest) < REACH


def test_what_is_no_number_never_wins() -> None:
    """NaN counts as -inf, and a row without anything else still gives a token."""
    row = np.array([np.nan, -np.inf, -50.0, np.nan], dtype=np.float32)
    for params in (RowParams(), RowParams(1.0), RowParams(1.0, top_k=3, top_p=0.9, min_p=0.1)):
        assert draw(row, params) == 2
        assert draw(row[[0, 1]], params) == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e6])
def test_any_temperature_gives_a_token(temperature: float) -> None:
    """The smallest are greedy, the largest uniform; no score overflows."""
    row = np.linspace(-30, 30, 1000, dtype=np.float32)
    drawn = {draw(row, RowParams(temperature, top_p=0.99, seed=seed)) for seed in range(20)}
    assert drawn == {999} if temperature < 1 else len(drawn) > 10
