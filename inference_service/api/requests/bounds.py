"""The bounds of a request, for every API: numbers and texts, messages and tools of a chat, sizes of JSON."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Final, get_args

from inference_service.core.constraint import Constraint
from inference_service.core.request import Message, Request
from inference_service.core.sampling import (
    KNOBS,
    MAX_BIAS,
    MAX_LOGPROBS as MAX_LOGPROBS,
    Ids,
    LogprobsMode,
    Number,
    Texts,
)
from loramux_shared.faults import Finding, PromptTooLong, RequestInvalid
from loramux_shared.untrusted_json import Bounds
from loramux_shared.wording import MAX_FINDINGS, SANE_ID

COUNTED: Final = 128 * 1024
"""Tokens that are made of a text that may have more than what is served: it is counted, or cut."""


def countable(max_seq_len: int) -> int:
    """Return how many tokens a text may have that is counted, or cut to its end."""
    return max(COUNTED, max_seq_len)


def check_ids(ids: Sized, max_seq_len: int) -> None:
    """Raise PromptTooLong for more token ids than fit, before they are copied or looked at one by one."""
    if len(ids) > max_seq_len:
        raise prompt_too_long(len(ids), max_seq_len)


def prompt_too_long(tokens: int, max_seq_len: int) -> PromptTooLong:
    """Return the fault of a prompt of so many tokens."""
    return PromptTooLong(
        f"the prompt has {tokens} tokens, and at most {max_seq_len - 1} leave room for an answer. "
        "Shorten the prompt."
    )


MAX_VALUES: Final = 1024 * 1024
"""256 prompts of 4096 token ids."""
MAX_NAMES: Final = 32_768
"""Names, objects and lists, together."""


JSON: Final = Bounds(MAX_NAMES, MAX_VALUES)


def json_bytes(value: object) -> int | None:
    """Return how many bytes a value has as JSON; None where it is nested too deeply."""
    try:
        return len(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except RecursionError:
        return None


def check_texts(texts: Iterable[str]) -> None:
    """Raise RequestInvalid for JSON texts inside a request that together have too much in them."""
    if much := JSON.exceeded_by(",".join(texts).encode(errors="replace")):
        raise RequestInvalid(f"the JSON texts of the request have {much}. Send less.")


ROLES: Final = ("system", "user", "assistant", "tool")
"""Roles as templates know them; ``developer``, which clients also use, is system."""
MAX_TOOLS: Final = 128
NAME: Final = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
"""Pattern of a function's name."""
EXPECTED_NAME: Final = "1 to 64 letters, digits, _, . or -"

MAX_VARIABLES: Final = 32
MAX_VARIABLE_BYTES: Final = 64 * 1024
_VARIABLE: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
EXPECTED_VARIABLE: Final = "a letter and up to 63 letters, digits and _"
RESERVED: Final = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("raise_exception", "strftime_now", "namespace", "self"),
    }
)
"""Variables that a template gets in other ways; so are special tokens, whose names end with ``_token``."""
VARIABLES: Final[Mapping[str, Any]] = {
    "maxProperties": MAX_VARIABLES,
    "propertyNames": {
        "pattern": f"^{_VARIABLE.pattern}$",
        "not": {"anyOf": [{"enum": sorted(RESERVED)}, {"pattern": "_token$"}]},
    },
}
"""Schema of the names of what a template reads beside these."""

Rule = tuple[bool, str, str, object]
"""Whether it is broken, the field, the expected value, the found value."""


def role_of(role: str) -> str:
    """Return a role as templates know it."""
    return "system" if role == "developer" else role


def thought_of(text: str) -> dict[str, str]:
    """Return what an assistant thought, by the names that templates have for it."""
    return {"reasoning_content": text, "reasoning": text}


def rules_of_turns(messages: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    """Yield the rules of messages, in the shape of `request.Message`."""
    for index, message in enumerate(messages):
        yield from _of_message(f"messages[{index}]", message)


def rules_of_tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    """Yield the rules of tools, in the shape of the OpenAI API."""
    yield len(tools) > MAX_TOOLS, "tools", f"at most {MAX_TOOLS}", len(tools)
    for index, tool in enumerate(tools if len(tools) <= MAX_TOOLS else ()):
        name = tool["function"]["name"]
        yield not NAME.fullmatch(name), f"tools[{index}].function.name", EXPECTED_NAME, repr(name)


def rules_of_the_end(messages: Sequence[Mapping[str, Any]], *, goes_on: bool, starts: bool) -> Iterator[Rule]:
    """Yield the rules of how rendered messages end: nothing stands behind what the answer continues with."""
    if not goes_on:
        return
    yield starts, "add_generation_prompt", "false, together with continue_final_message", "true"
    content = messages[-1]["content"] if messages else ""
    where = f"messages[{max(0, len(messages) - 1)}].content"
    yield not content, where, "text, which continue_final_message continues", "none"


def rules_of_variables(variables: Mapping[str, Any]) -> Iterator[Rule]:
    """Yield the rules of what a template reads beside messages, tools and the like."""
    where = "chat_template_kwargs"
    if not variables:
        return
    yield len(variables) > MAX_VARIABLES, where, f"at most {MAX_VARIABLES} names", len(variables)
    for name in islice(variables, MAX_VARIABLES):
        yield not _VARIABLE.fullmatch(name), where, EXPECTED_VARIABLE, repr(name)
        taken = name in RESERVED or name.endswith("_token")
        yield (
            taken,
            f"{where}.{name[:64]}",
            "a name that is not the template's own; use the request's field",
            name,
        )
    size, expected = json_bytes(variables), f"at most {MAX_VARIABLE_BYTES} bytes of JSON"
    yield size is None or size > MAX_VARIABLE_BYTES, where, expected, size or "more"


def _of_message(where: str, message: Mapping[str, Any]) -> Iterator[Rule]:
    role, calls = message["role"], message.get("tool_calls") or ()
    yield role not in ROLES, f"{where}.role", f"one of developer, {', '.join(ROLES)}", repr(role)
    thinks = message.get("reasoning_content") is not None
    yield (
        thinks and role != "assistant",
        f"{where}.reasoning_content",
        "reasoning only with role assistant",
        role,
    )
    unanswered = role == "tool" and not message.get("tool_call_id")
    yield unanswered, f"{where}.tool_call_id", "the id of a call, in a message with role tool", "none"
    yield bool(calls) and role != "assistant", f"{where}.tool_calls", "calls only with role assistant", role
    for index, call in enumerate(calls):
        name = call["function"]["name"]
        expected = "the name of a function"
        yield not name, f"{where}.tool_calls[{index}].function.name", expected, repr(name)


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
MAX_FOUND: Final = 80
"""Characters of a value that a finding repeats."""


def refused(where: str, expected: str, found: object) -> RequestInvalid:
    """Return the fault of a field that cannot be taken with the others."""
    return RequestInvalid.of_field("the request is not valid.", where, expected, str(found))


def largest_numbers(vocab: int, max_queue: int, max_seq_len: int) -> dict[str, int]:
    """Return the bounds of numbers that a server sets, beside those of all servers in `NUMBERS`."""
    return {"n": max_queue, "truncate_prompt_tokens": max_seq_len, "logprobs": vocab, "prompt_logprobs": vocab}


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
    most = largest_numbers(vocab, max_queue, max_seq_len)
    rules = (_prompt(request, vocab), _numbers(request, most), _lists(request, vocab), _others(request))
    _judge(chain.from_iterable(rules))


def check_turns(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    goes_on: bool,
    starts: bool,
) -> None:
    """Raise RequestInvalid, with one finding per field, for messages, tools and variables that break a rule."""
    end = rules_of_the_end(messages, goes_on=goes_on, starts=starts)
    _judge(chain(rules_of_turns(messages), rules_of_tools(tools), rules_of_variables(variables), end))


def check_constraint(constraint: Constraint | None) -> None:
    """Raise RequestInvalid for a constraint that is too long and was made when the prompt was known."""
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
    for name, bound in NUMBERS.items():
        if (value := request.value_of(name)) is not None:
            high = min(bound.high, most.get(name, math.inf))
            if not bound.low <= value <= high:
                yield True, name, str(replace(bound, high=high)), value


def _lists(request: Request, vocab: int) -> Iterator[Rule]:
    for name, (most, longest) in TEXTS.items():
        if not (value := request.value_of(name)) and value != "":
            continue
        texts = (value,) if isinstance(value, str) else value
        yield len(texts) > most, name, f"at most {most} texts", len(texts)
        wrong = sorted({len(text) for text in texts if not 0 < len(text) <= longest})
        yield bool(wrong), name, f"texts of 1 to {longest} characters", wrong
    for name, few in IDS.items():
        if not (ids := request.value_of(name)):
            continue
        most = few or vocab
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
