"""Ranks: how many tokens are more likely, and what tokens that tie have in common."""

from __future__ import annotations

from pathlib import Path

import torch

from inference_service.core.sequence import Token
from inference_service.engine.logprobs import report
from inference_service.openai_api.logprobs import prompt_logprobs
from inference_service.serving.text import Text
from tests.support.tiny import VOCAB, write_tokenizer


def test_a_rank_counts_the_tokens_that_are_more_likely() -> None:
    """Tokens that tie share a rank, and the next has the place that it would have without ties."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]).expand(5, 5)
    assert [token.rank for token in report(logits, [0, 1, 2, 3, 4], 2)] == [4, 1, 1, 5, 1]


def test_ranks_of_masked_tokens_are_finite() -> None:
    """Tokens that are impossible are the last, all of them."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]])
    assert [report(logits, [token], 0)[0].rank for token in range(4)] == [2, 3, 1, 3]


def test_what_the_door_lists_has_the_same_ranks(tmp_path: Path) -> None:
    """The token of the prompt and its alternatives are ranked by one rule."""
    write_tokenizer(tmp_path)
    best = ((40, -0.5), (41, -0.5), (42, -2.0))
    [first, scored] = prompt_logprobs([Token(5), Token(41, -0.5, best, 1)], Text.load(tmp_path, VOCAB))
    assert first is None
    assert scored is not None
    assert {token: entry["rank"] for token, entry in scored.items()} == {"40": 1, "41": 1, "42": 3}
