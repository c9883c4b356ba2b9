"""Ranks: the number of more likely tokens, and the ranks of ties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.sampler import processed, report, sample
from inference_service.http.openai.logprobs import prompt_logprobs
from inference_service.kernels.sampling import RowParams
from inference_service.kernels.sampling.reference import distribution
from inference_service.text.text import Text
from tests.support.tiny import VOCAB, write_tokenizer


def test_a_rank_counts_the_tokens_that_are_more_likely() -> None:
    """Tokens that tie share a rank, and the next has the place that it would have without ties."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]).expand(5, 5)
    assert [token.rank for token in report(logits, [0, 1, 2, 3, 4], 2)] == [4, 1, 1, 5, 1]


def test_ranks_of_masked_tokens_are_finite() -> None:
    """Tokens that are impossible are the last, all of them."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    assert [report(logits, [token], 0)[0].rank for token in range(4)] == [2, 3, 1, 3]


def test_what_the_api_lists_has_the_same_ranks(tmp_path: Path) -> None:
    """The token of the prompt and its alternatives are ranked by one rule."""
    write_tokenizer(tmp_path)
    best = ((40, -0.5), (41, -0.5), (42, -2.0))
    [first, scored] = prompt_logprobs([Token(5), Token(41, -0.5, best, 1)], Text.load(tmp_path, VOCAB))
    assert first is None
    assert {token: entry["rank"] for token, entry in scored.items()} == {"40": 1, "41": 1, "42": 3}


DRAWS = ({}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8, "min_p": 0.05})


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_processed_are_those_of_the_distribution(draw: dict[str, float], temperature: float) -> None:
    """Processed log probabilities are those after temperature, of the allowed tokens; the others are -inf."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    params = SamplingParams(temperature=temperature, **draw)  # type: ignore[arg-type]
    mass = distribution(logits[0], RowParams(temperature, **draw))  # type: ignore[arg-type]
    token = int(mass.argmax())
    found = torch.log_softmax(processed(logits, torch.tensor([token]), [params])[0], dim=-1).double()
    torch.testing.assert_close(found.exp(), mass / mass.sum(), rtol=1e-5, atol=1e-7)


def test_a_drawn_token_always_takes_part() -> None:
    """A token has a probability although a draw rounds otherwise at the edge of top-p."""
    logits = torch.tensor([[5.0, 0.0, -1.0]])
    params = SamplingParams(temperature=1.0, top_p=0.5)
    assert processed(logits, torch.tensor([0]), [params])[0].isfinite().tolist() == [True, False, False]
    assert processed(logits, torch.tensor([2]), [params])[0].isfinite().tolist() == [True, False, True]


def test_a_request_gets_the_log_probabilities_that_it_asks_for() -> None:
    """Raw ones whatever is done to the logits; processed ones after bias and temperature, greedy without it."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    bias = {2: 4.0}

    def score(**sampling: object) -> Token:
        params = SamplingParams(logit_bias=bias, logprobs=4, **sampling)  # type: ignore[arg-type]
        [token] = sample(logits, [Sequence("s", [0], params)])
        return token

    raw = torch.log_softmax(logits[0], dim=-1)
    biased = logits[0] + torch.tensor([0.0, 0.0, 4.0, 0.0])
    for sampling, expected in (
        ({"temperature": 0.5}, raw),
        ({"temperature": 0.5, "logprobs_mode": "processed"}, torch.log_softmax(biased / 0.5, dim=-1)),
        ({"logprobs_mode": "processed"}, torch.log_softmax(biased, dim=-1)),
    ):
        found = dict(score(**sampling).top)
        torch.testing.assert_close(torch.tensor([found[token] for token in range(4)]), expected)
