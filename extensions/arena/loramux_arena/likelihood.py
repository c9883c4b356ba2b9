"""The likelihood of a reference for a version: its log probability as the answer, by a request without answers.

The reference is the end of the prompt, so its tokens are the last ones. A token that begins before it, as
one may where two texts meet, counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loramux.records import GenerateOptions, Prompt, PromptToken
from loramux_arena.examples import Example
from loramux_shared.faults import Finding, RequestInvalid

SCORING: Final[GenerateOptions] = {"max_tokens": 0, "prompt_logprobs": 0}


def prompt_with_reference(example: Example) -> tuple[Prompt, GenerateOptions]:
    """Return a prompt that ends with the reference, as text or as the assistant's turn, and how to send it."""
    if isinstance(example.prompt, str):
        return example.prompt + example.reference, SCORING
    turns: list[Mapping[str, Any]] = [turn for turn in example.prompt if isinstance(turn, Mapping)]
    options: GenerateOptions = {**SCORING, "continue_final_message": True, "add_generation_prompt": False}
    return [*turns, {"role": "assistant", "content": example.reference}], options


def likelihood_of(reference: str, tokens: Sequence[PromptToken]) -> float:
    """Return the log probability per token of the reference at the end of a prompt.

    Raises:
        RequestInvalid: the prompt does not end with the reference: the template changes it, or it is empty.
    """
    for candidate in dict.fromkeys((reference, reference.strip())):
        ending = candidate.encode()
        found: list[float] = []
        tail = b""
        for token in reversed(tokens):
            if len(tail) >= len(ending) or token.logprobs is None:
                break
            tail = token.logprobs.token + tail
            found.append(token.logprobs.logprob)
        if ending and tail.endswith(ending):
            return sum(found) / len(found)
    finding = Finding(
        code="E_BAD_FIELD",
        where="reference",
        expected="a text that ends the prompt as it stands",
        found="another ending: the chat template writes answers otherwise" if reference.strip() else "no text",
        fix="Ask with text instead of messages, or leave the line out.",
    )
    raise RequestInvalid("the reference cannot be scored", [finding])
