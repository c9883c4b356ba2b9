"""Greedy answers of transformers, found in one pass where a guess is right."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.support.tiny import oracle_tokens


def greedy_tokens(model: Any, prompt: Sequence[int], guess: Sequence[int]) -> list[int]:
    """Return as many greedy tokens as a guess has: its own up to the first wrong one, then the model's."""
    choices, _ = choices_and_logprobs(model, prompt, guess)
    pairs = zip(choices, guess, strict=True)
    right = next((place for place, (own, other) in enumerate(pairs) if own != other), len(guess))
    answer = [*guess[:right]]
    return answer + (oracle_tokens(model, [*prompt, *answer], len(guess) - right) if right < len(guess) else [])


@torch.inference_mode()
def choices_and_logprobs(
    model: Any, prompt: Sequence[int], answer: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Return the likeliest token at every place of an answer, and the log probabilities of the answer."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    rows = torch.log_softmax(model(ids, use_cache=False).logits[0, len(prompt) - 1 :], dim=-1)
    return rows.argmax(-1).tolist(), rows.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
