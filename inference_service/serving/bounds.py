"""The bounds of a request's fields, for both APIs and the client."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Final, get_args

from inference_service.core.constraint import Constraint
from inference_service.core.sampling import (
    KNOBS,
    MAX_BIAS,
    MAX_LOGPROBS as MAX_LOGPROBS,
    Ids,
    LogprobsMode,
    Number,
    Texts,
)
from inference_service.serving.prompts import (
    Rule,
    check_ids,
    countable,
    rules_of_the_end,
    rules_of_tools,
    rules_of_turns,
    rules_of_variables,
)
from inference_service.serving.request import Message, Request
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.wording import MAX_FINDINGS

LOGPROBS_MODES: Final[tuple[str, ...]] = get_args(LogprobsMode)
NUMBERS: Final[Mapping[str, Number]] = {
    "n": Number(1, 128),
    **{name: bound for name, bound in KNOBS.items() if isinstance(bound, Number)},
    "truncate_prompt_tokens": Number(-1),
}
"""Bounds by the field of `Request` or of its `Sampling`."""
TEXTS: Final[Mapping[str, tuple[int, int]]] = {
    **{name: (bound.most, bound.longest) for name, bound in KNOBS.items() if isinstance(bound, Texts)},
    "cache_salt": (1, 256),
}
"""Bounds of lists of texts: their number, and the characters of each."""
IDS: Final[Mapping[str, int | None]] = {
    name: bound.most for name, bound in KNOBS.items() if isinstance(bound, Ids)
}
"""Bounds of lists of tokens; None: the vocabulary."""
MAX_CONSTRAINT_BYTES: Final = 64 * 1024
SANE_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,128}")
"""Pattern of a request's id that may stand in a header and in a log."""
MAX_FOUND: Final = 80
"""Characters of a value that a finding repeats."""


def refused(where: str, expected: str, found: object) -> RequestInvalid:
    """Return the fault of a field that cannot be taken with the others."""
    finding = Finding(code="E_BAD_FIELD", where=where, expected=expected, found=str(found))
    return RequestInvalid("the request is not valid.", [finding])


def check(request: Request, vocab: int, max_queue: int, max_seq_len: int) -> None:
    """Check all fields that can be judged without the prompt's tokens.

    Both APIs pass here before anything is built from a number of the request.

    Raises:
        PromptTooLong: there are more token ids than fit.
        RequestInvalid: with one finding per field that is out of bounds.
    """
    prompt = request.prompt.content
    if not isinstance(prompt, str) and isinstance(next(iter(prompt), None), int):
        cut = request.prompt.truncate_prompt_tokens is not None
        check_ids(prompt, countable(max_seq_len) if cut else max_seq_len)
    most = {"n": max_queue, "truncate_prompt_tokens": max_seq_len, "logprobs": vocab, "prompt_logprobs": vocab}
    rules = (
        _prompt(request, vocab),
        _numbers(request, most),
        _lists(request, vocab),
        _others(request),
    )
    _judge(chain.from_iterable(rules))


def check_turns(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    goes_on: bool,
    starts: bool,
) -> None:
    """Look at the messages, tools and variables that are to be rendered.

    Raises:
        RequestInvalid: with one finding per field that breaks a rule.
    """
    end = rules_of_the_end(messages, goes_on=goes_on, starts=starts)
    _judge(chain(rules_of_turns(messages), rules_of_tools(tools), rules_of_variables(variables), end))


def check_constraint(constraint: Constraint | None) -> None:
    """Look at a constraint that was made when the prompt was known.

    Raises:
        RequestInvalid: it is too long.
    """
    _judge(_constraint(constraint))


def _judge(rules: Iterable[Rule]) -> None:
    broken = (
        Finding(code="E_BAD_FIELD", where=where, expected=expected, found=str(found)[:MAX_FOUND])
        for wrong, where, expected, found in rules
        if wrong
    )
    findings = list(islice(broken, MAX_FINDINGS))
    if findings:
        raise RequestInvalid("the request has fields out of bounds.", findings)


def _prompt(request: Request, vocab: int) -> Iterator[Rule]:
    prompt, content = request.prompt, request.prompt.content
    if isinstance(content, str):
        return
    wrong = [item for item in content if isinstance(item, int) and not 0 <= item < vocab]
    yield bool(wrong), "token_ids", f"ids from 0 to {vocab - 1}", wrong[:5]
    turns = [item for item in content if isinstance(item, Mapping)]
    if turns:
        yield from rules_of_turns(turns)
        end = {"goes_on": prompt.continue_final_message, "starts": prompt.add_generation_prompt}
        yield from rules_of_the_end(turns, **end)
    yield from rules_of_tools(prompt.tools)
    yield from rules_of_variables(prompt.chat_template_kwargs)


def _numbers(request: Request, most: Mapping[str, int]) -> Iterator[Rule]:
    for name, usual in NUMBERS.items():
        value = request.value_of(name)
        if value is not None:
            bound = replace(usual, high=min(usual.high, most[name])) if name in most else usual
            yield not bound.low <= value <= bound.high, name, str(bound), value


def _lists(request: Request, vocab: int) -> Iterator[Rule]:
    for name, (most, longest) in TEXTS.items():
        value = request.value_of(name)
        texts = (value,) if isinstance(value, str) else value or ()
        yield len(texts) > most, name, f"at most {most} texts", len(texts)
        wrong = sorted({len(text) for text in texts if not 0 < len(text) <= longest})
        yield bool(wrong), name, f"texts of 1 to {longest} characters", wrong
    for name, few in IDS.items():
        most, ids = few or vocab, request.value_of(name) or ()
        yield len(ids) > most, name, f"at most {most} tokens", len(ids)
        foreign = [token for token in ids if not 0 <= token < vocab]
        yield bool(foreign), name, f"ids from 0 to {vocab - 1}", foreign[:5]
    words, (most, longest) = request.sampling.bad_words_token_ids, TEXTS["bad_words"]
    yield len(words) > most, "bad_words_token_ids", f"at most {most} words", len(words)
    wrong = sorted({len(word) for word in words if not 0 < len(word) <= longest})
    yield bool(wrong), "bad_words_token_ids", f"words of 1 to {longest} tokens", wrong
    foreign = [token for word in words for token in word if not 0 <= token < vocab]
    yield bool(foreign), "bad_words_token_ids", f"ids from 0 to {vocab - 1}", foreign[:5]


def _others(request: Request) -> Iterator[Rule]:
    sampling = request.sampling
    alone = sampling.max_tokens == 0 and sampling.prompt_logprobs is None and request.output.pooling is None
    yield alone, "max_tokens", "at least 1, where no prompt_logprobs are asked for", 0
    most = math.inf if sampling.max_tokens is None else max(0, sampling.max_tokens)
    yield sampling.min_tokens > most, "min_tokens", "0 to max_tokens", sampling.min_tokens
    yield request.prompt.truncate_prompt_tokens == 0, "truncate_prompt_tokens", "-1, or at least 1", 0
    mode = sampling.logprobs_mode
    yield mode is not None and mode not in LOGPROBS_MODES, "logprobs_mode", " or ".join(LOGPROBS_MODES), mode
    yield sampling.allowed_token_ids == (), "allowed_token_ids", "at least one token", "none"
    wild = [value for value in sampling.logit_bias.values() if not -MAX_BIAS <= value <= MAX_BIAS]
    yield bool(wild), "logit_bias", f"{-MAX_BIAS:g} to {MAX_BIAS:g}", wild[:5]
    yield not SANE_ID.fullmatch(request.id), "request_id", "1 to 128 letters, digits, _, ., : or -", request.id
    yield from _constraint(request.output.constraint)


def _constraint(constraint: Constraint | None) -> Iterator[Rule]:
    if constraint is not None:
        size, expected = len(constraint.text.encode()), f"at most {MAX_CONSTRAINT_BYTES} bytes"
        yield size > MAX_CONSTRAINT_BYTES, constraint.where, expected, size
