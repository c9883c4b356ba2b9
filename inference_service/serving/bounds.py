"""What the fields of a request may hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Final

from inference_service.serving.lengths import check_ids
from inference_service.serving.request import Message, Request
from inference_service.serving.turns import Rule, rules_of_tools, rules_of_turns
from loramux_shared.faults import Finding, RequestInvalid
from loramux_shared.near import MAX_FINDINGS

MAX_ANSWERS: Final = 128
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_STOP_IDS: Final = 64
MAX_LOGPROBS: Final = 20
MAX_BIASES: Final = 1024
MAX_BIAS: Final = 100.0
MAX_PENALTY: Final = 2.0
REPETITION: Final = (0.01, 10.0)
SEEDS: Final = (-(2**63), 2**64 - 1)
"""What the doors' own numbers can say: int64 in JSON, uint64 over gRPC."""
MAX_CONSTRAINT_BYTES: Final = 64 * 1024
MAX_FOUND: Final = 80
"""Characters of a value that a finding repeats."""


def check(request: Request, vocab: int, max_queue: int, max_seq_len: int) -> None:
    """Look at all fields that can be judged without the prompt's tokens.

    Both doors pass here before anything is built from a number of the request.

    Raises:
        PromptTooLong: there are more token ids than fit.
        RequestInvalid: with one finding per field that is out of bounds.
    """
    if not isinstance(request.prompt, str) and isinstance(next(iter(request.prompt), None), int):
        check_ids(request.prompt, max_seq_len)
    rules = (
        _prompt(request, vocab),
        _lengths(request, vocab, max_queue),
        _numbers(request),
        _lists(request, vocab),
    )
    _judge(chain.from_iterable(rules))


def check_turns(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Look at the messages and tools that are to be rendered.

    Raises:
        RequestInvalid: with one finding per field that breaks a rule.
    """
    _judge(chain(rules_of_turns(messages), rules_of_tools(tools)))


def _judge(rules: Iterable[Rule]) -> None:
    broken = (
        Finding(code="E_BAD_FIELD", where=where, expected=expected, found=str(found)[:MAX_FOUND])
        for wrong, where, expected, found in rules
        if wrong
    )
    findings = list(islice(broken, MAX_FINDINGS))
    if findings:
        fields = ", ".join(sorted({finding.where for finding in findings}))
        raise RequestInvalid(f"the request has fields out of bounds: {fields}.", findings)


def _prompt(request: Request, vocab: int) -> Iterator[Rule]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return
    wrong = [item for item in prompt if isinstance(item, int) and not 0 <= item < vocab]
    yield bool(wrong), "token_ids", f"ids from 0 to {vocab - 1}", wrong[:5]
    turns = [item for item in prompt if isinstance(item, Mapping)]
    if turns:
        yield from rules_of_turns(turns)
    yield from rules_of_tools(request.tools)


def _lengths(request: Request, vocab: int, max_queue: int) -> Iterator[Rule]:
    answers = min(MAX_ANSWERS, max_queue)
    yield not 1 <= request.n <= answers, "n", f"1 to {answers}", request.n
    alone = request.max_tokens == 0 and request.prompt_logprobs is None
    yield alone, "max_tokens", "at least 1, where no prompt_logprobs are asked for", 0
    negative = request.max_tokens is not None and request.max_tokens < 0
    yield negative, "max_tokens", "at least 1", request.max_tokens
    most = request.max_tokens if request.max_tokens is not None else math.inf
    wrong = request.min_tokens is not None and not 0 <= request.min_tokens <= most
    yield wrong, "min_tokens", "0 to max_tokens", request.min_tokens
    reported = min(MAX_LOGPROBS, vocab)
    for name, count in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        yield count is not None and not 0 <= count <= reported, name, f"0 to {reported}", count


def _numbers(request: Request) -> Iterator[Rule]:
    penalty = (-MAX_PENALTY, MAX_PENALTY, f"{-MAX_PENALTY:g} to {MAX_PENALTY:g}")
    smallest = math.ulp(0.0)
    for name, value, (low, high, expected) in (
        ("temperature", request.temperature, (0.0, 100.0, "0 to 100")),
        ("top_p", request.top_p, (smallest, 1.0, "above 0, at most 1")),
        ("top_k", request.top_k, (0, math.inf, "at least 0")),
        ("min_p", request.min_p, (0.0, 1.0, "0 to 1")),
        ("repetition_penalty", request.repetition_penalty, (*REPETITION, "0.01 to 10")),
        ("presence_penalty", request.presence_penalty, penalty),
        ("frequency_penalty", request.frequency_penalty, penalty),
    ):
        yield value is not None and not low <= value <= high, name, expected, value
    foreign = request.seed is not None and not SEEDS[0] <= request.seed <= SEEDS[1]
    yield foreign, "seed", "an integer of 64 bits", request.seed


def _lists(request: Request, vocab: int) -> Iterator[Rule]:
    yield len(request.stop) > MAX_STOPS, "stop", f"at most {MAX_STOPS} texts", len(request.stop)
    wrong = sorted({len(text) for text in request.stop if not 0 < len(text) <= MAX_STOP_CHARS})
    yield bool(wrong), "stop", f"texts of 1 to {MAX_STOP_CHARS} characters", wrong
    many = len(request.stop_token_ids) > MAX_STOP_IDS
    yield many, "stop_token_ids", f"at most {MAX_STOP_IDS}", len(request.stop_token_ids)
    foreign = [token for token in request.stop_token_ids[:MAX_STOP_IDS] if not 0 <= token < vocab]
    yield bool(foreign), "stop_token_ids", f"ids from 0 to {vocab - 1}", foreign[:5]
    bias = request.logit_bias
    yield len(bias) > MAX_BIASES, "logit_bias", f"at most {MAX_BIASES} tokens", len(bias)
    foreign = [token for token in bias if not 0 <= token < vocab]
    yield bool(foreign), "logit_bias", f"ids from 0 to {vocab - 1}", foreign[:5]
    wild = [value for value in bias.values() if not -MAX_BIAS <= value <= MAX_BIAS]
    yield bool(wild), "logit_bias", f"{-MAX_BIAS:g} to {MAX_BIAS:g}", wild[:5]
    size = len(request.constraint.text.encode()) if request.constraint else 0
    expected = f"at most {MAX_CONSTRAINT_BYTES} bytes"
    yield size > MAX_CONSTRAINT_BYTES, "response_format", expected, size
