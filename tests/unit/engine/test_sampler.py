"""Log probabilities of draws, and the changes of a request to its logits."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from inference_service.api.requests.terms import completing
from inference_service.core.constraint import Grammar
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence, Token
from inference_service.engine.execution.sampler import processed, sample, shape
from inference_service.engine.kernels.sampling import RowParams
from inference_service.engine.kernels.sampling.host import REACH
from inference_service.engine.kernels.sampling.reference import distribution
from tests.support.examples import examples
from tests.support.grammars import allow_only
from tests.support.tiny import VOCAB


def test_what_cannot_win_is_out_of_reach_of_all_noise() -> None:
    """The noise of the smallest and of the largest word, between which all others lie."""
    lowest, highest = (-np.log(-np.log1p(-(word + 0.5) / 2**32)) for word in (0, 2**32 - 1))
    assert abs(highest - lowest) < REACH


DRAWS = ({}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8, "min_p": 0.05})


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_processed_are_those_of_the_distribution(draw: dict[str, float], temperature: float) -> None:
    """The logits behind processed log probabilities are those that tokens are drawn from."""
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


def seq(tokens, answer=None, grammar: Grammar | None = None, **sampling: Any) -> Sequence:
    made = Sequence("s", list(tokens), SamplingParams(**sampling), grammar=grammar)
    made.progress.tokens += answer or []
    return made


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=examples(25))
@given(st.floats(0.1, 10), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), st.integers(0, 99))
def test_the_repetition_penalty_is_that_of_transformers(penalty: float, tokens: list[int], seed: int) -> None:
    """The repetition penalty changes logits as transformers does."""
    model = logits(seed)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), model.clone())
    found = shape(model[0], seq(tokens[:1], tokens[1:], repetition_penalty=penalty))
    torch.testing.assert_close(found, expected[0])


def test_presence_and_frequency_are_of_the_answer_alone() -> None:
    """OpenAI's formula: c * frequency + (c > 0) * presence, with c counted in the answer, not in the prompt."""
    model = logits(1)[0]
    found = shape(model, seq([3, 4], [5, 6, 5], presence_penalty=0.5, frequency_penalty=0.25))
    expected = model.clone()
    expected[5] -= 0.5 + 2 * 0.25
    expected[6] -= 0.5 + 0.25
    torch.testing.assert_close(found, expected)


def test_a_grammar_comes_before_min_tokens() -> None:
    """A stop token that the grammar alone leaves is drawn for any length of the answer."""
    ends: dict[str, Any] = {"min_tokens": 5, "stop_token_ids": frozenset([9])}
    assert sample(logits(4), [seq([1], grammar=allow_only(9), **ends)])[0].id == 9
    assert sample(logits(4), [seq([1], grammar=allow_only(9, 11), **ends)])[0].id == 11


@settings(max_examples=examples(60))
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_bad_words_are_vllms(words: list[list[int]], answer: list[int]) -> None:
    """The last token of a word is out exactly where the answer, without the prompt, ends with its others."""
    found = shape(logits(3)[0], seq([0, 1, 2, 3], answer, bad_words=completing(map(tuple, words))))
    expected = {word[-1] for word in words if (answer + word[-1:])[-len(word) :] == word}
    assert set(found.isneginf().nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["bias", "nothing allowed", "infinite"])
def test_hopeless_logits_still_give_a_token(kind: str, temperature: float) -> None:
    """A row without any likely token still gives one of the vocabulary."""
    model = torch.full((1, VOCAB), -torch.inf) if kind == "infinite" else logits(5)
    bias = dict.fromkeys(range(VOCAB), -100.0) if kind == "bias" else {}
    grammar = allow_only() if kind == "nothing allowed" else None
    made = seq([1], grammar=grammar, temperature=temperature, logit_bias=bias, top_p=0.5, top_k=3, min_p=0.1)
    assert 0 <= sample(model, [made])[0].id < VOCAB
