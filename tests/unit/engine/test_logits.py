"""The changes of a request to its logits, and the draw from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from inference_service.core.constraint import Grammar
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence
from inference_service.engine.sampler import sample, shape
from tests.support.examples import examples
from tests.support.grammars import only

VOCAB = 50


def seq(
    tokens: list[int], answer: list[int] | None = None, grammar: Grammar | None = None, **sampling: Any
) -> Sequence:
    """A sequence with a prompt, and the answer so far."""
    made = Sequence("s", list(tokens), SamplingParams(**sampling), grammar=grammar)
    made.progress.tokens += answer or []
    return made


def logits(seed: int, rows: int = 1) -> torch.Tensor:
    """Random logits [rows, vocab]."""
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=examples(25))
@given(st.floats(0.1, 10), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), st.integers(0, 99))
def test_the_repetition_penalty_is_that_of_transformers(penalty: float, tokens: list[int], seed: int) -> None:
    """Tokens of prompt and answer are made less likely by the same formula."""
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


def test_a_bias_is_added() -> None:
    """A bias moves the logits of its tokens, and no others."""
    model = logits(2)[0]
    before = model.clone()
    found = shape(model, seq([1], logit_bias={7: 100.0, 8: -100.0}))
    assert found[7] == before[7] + 100
    assert found[8] == before[8] - 100
    assert torch.equal(model, before)


def test_a_grammar_comes_before_min_tokens() -> None:
    """A stop token that the grammar alone leaves is drawn for any length of the answer."""
    ends: dict[str, Any] = {"min_tokens": 5, "stop_token_ids": frozenset([9])}
    assert sample(logits(4), [seq([1], grammar=only(9), **ends)])[0].id == 9
    assert sample(logits(4), [seq([1], grammar=only(9, 11), **ends)])[0].id == 11


@settings(max_examples=examples(60))
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_bad_words_are_vllms(words: list[list[int]], answer: list[int]) -> None:
    """The last token of a word is out exactly where the answer, without the prompt, ends with its others."""
    table: dict[int, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for *before, last in words:
        lasts = table.setdefault(len(before), {})
        lasts[tuple(before)] = (*lasts.get(tuple(before), ()), last)
    found = shape(logits(3)[0], seq([0, 1, 2, 3], answer, bad_words=table))
    expected = {word[-1] for word in words if (answer + word[-1:])[-len(word) :] == word}
    assert set(found.isneginf().nonzero().flatten().tolist()) == expected


@given(st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=examples(12))
def test_min_p_leaves_what_transformers_leaves(min_p: float, seed: int) -> None:
    """The sampler draws no token that transformers' min_p leaves out."""
    left = MinPLogitsWarper(min_p)(torch.empty(1, 0), logits(seed))[0].isfinite()
    drawn = {
        sample(logits(seed), [seq([1], temperature=1.0, min_p=min_p, seed=draw)])[0].id for draw in range(30)
    }
    assert all(left[token] for token in drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["bias", "nothing allowed", "infinite"])
def test_hopeless_logits_still_give_a_token(kind: str, temperature: float) -> None:
    """A token comes out of any logits: a row never breaks the batch."""
    model = torch.full((1, VOCAB), -torch.inf) if kind == "infinite" else logits(5)
    bias = dict.fromkeys(range(VOCAB), -100.0) if kind == "bias" else {}
    grammar = only() if kind == "nothing allowed" else None
    made = seq([1], grammar=grammar, temperature=temperature, logit_bias=bias, top_p=0.5, top_k=3, min_p=0.1)
    assert 0 <= sample(model, [made])[0].id < VOCAB
