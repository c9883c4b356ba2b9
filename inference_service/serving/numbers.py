"""Numbers of a request, as the engine takes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from typing import Final, TypeVar

from inference_service.core.sampling import SamplingParams
from inference_service.serving.lengths import prompt_too_long
from loramux_shared.faults import PromptTooLong

N = TypeVar("N", int, float)
LEAST: Final = 1e-6
"""Temperatures and top_p between 0 and this mean this: less would divide by what float32 takes for 0."""


def of_answer(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the sampling of one answer: only the first scores the prompt, the others have own seeds."""
    if not index:
        return sampling
    seed = int.from_bytes(blake2b(f"{sampling.seed}:{index}".encode(), digest_size=8).digest()) >> 1
    return replace(sampling, seed=seed, prompt_logprobs=None)


def first(said: N | None, adapters: N | None, default: N) -> N:
    """Return what the request says, else what the adapter brings."""
    given = adapters if said is None else said
    return default if given is None else given


def completing(
    words: Iterable[tuple[int, ...]],
) -> dict[int, dict[tuple[int, ...], tuple[int, ...]]]:
    """Return the tokens that complete one of these words, by how many and which stand before them."""
    found: dict[int, dict[tuple[int, ...], tuple[int, ...]]] = {}
    for *before, last in words:
        lasts = found.setdefault(len(before), {})
        lasts[tuple(before)] = (*lasts.get(tuple(before), ()), last)
    return found


def drawable(value: float) -> float:
    """Return a value that is 0 or not below the least."""
    return max(LEAST, value) if value else value


def room(wanted: int | None, prompt_tokens: int, max_seq_len: int) -> int:
    """Return how many new tokens fit behind a prompt.

    Raises:
        PromptTooLong: not as many as are wanted.
    """
    left = max_seq_len - prompt_tokens
    if left < (0 if wanted == 0 else 1):
        raise prompt_too_long(prompt_tokens, max_seq_len)
    if wanted is not None and wanted > left:
        raise PromptTooLong(
            f"{prompt_tokens} tokens of prompt and {wanted} of answer exceed the longest "
            f"sequence of {max_seq_len}. Shorten the prompt, or ask for at most {left} tokens."
        )
    return left
