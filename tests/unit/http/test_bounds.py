"""The bounds of a request's fields, which every API checks in one place."""

import math
from typing import Any

import pytest

from inference_service.core.constraint import Constraint
from inference_service.serving.bounds import check
from inference_service.serving.request import Request
from loramux_shared.faults import PromptTooLong, RequestInvalid
from tests.support.cases import cases

USER = {"role": "user", "content": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {}}}
CALL_TURN = {"role": "assistant", "content": "", "tool_calls": [CALL]}
VOCAB, QUEUE, LENGTH = 199, 64, 256


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def named(fields: dict[str, Any]) -> list[str]:
    """Return the names of the fields out of bounds in a request."""
    fields = {"prompt": (5, 6)} | fields
    try:
        check(Request.of("base", **fields), VOCAB, QUEUE, LENGTH)
    except RequestInvalid as fault:
        return [finding.where for finding in fault.findings]
    return []


def test_a_length_below_nothing_is_one_fault() -> None:
    assert named({"max_tokens": -1}) == ["max_tokens"]
    assert named({"max_tokens": 2, "min_tokens": 3}) == ["min_tokens"]


@pytest.mark.parametrize(
    ("name", "low", "high", "step"), cases(__file__, "test_a_number_is_taken_up_to_its_bounds")
)
def test_a_number_is_taken_up_to_its_bounds(name: str, low: float, high: float, step: float) -> None:
    assert named({name: low}) == named({name: high}) == []
    beyond = [low - step, *([high + step] if high < 2**70 else []), *([math.nan] * (step < 1))]
    assert [named({name: number}) for number in beyond] == [[name]] * len(beyond)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"temperature": -1, "top_p": 0}, ["temperature", "top_p"]),
    ({"temperature": math.inf}, ["temperature"]),
    ({"max_tokens": 3, "min_tokens": 4}, ["min_tokens"]),
    ({"truncate_prompt_tokens": -2}, ["truncate_prompt_tokens"]),
    ({"stop": ("x",) * 17}, ["stop"]),
    ({"stop": ("",)}, ["stop"]),
    ({"stop": ("x" * 257,)}, ["stop"]),
    ({"stop": ("x",) * 17, "logprobs": 21}, ["logprobs", "stop"]),
    ({"bad_words": ("x",) * 1025}, ["bad_words"]),
    ({"bad_words": ("",)}, ["bad_words"]),
    ({"bad_words": ("x" * 257,)}, ["bad_words"]),
    ({"bad_words_token_ids": ((),)}, ["bad_words_token_ids"]),
    ({"bad_words_token_ids": ((VOCAB,),)}, ["bad_words_token_ids"]),
    ({"cache_salt": ""}, ["cache_salt"]),
    ({"cache_salt": "x" * 257}, ["cache_salt"]),
    ({"stop_token_ids": (5,) * 65}, ["stop_token_ids"]),
    ({"stop_token_ids": (VOCAB,)}, ["stop_token_ids"]),
    ({"allowed_token_ids": ()}, ["allowed_token_ids"]),
    ({"allowed_token_ids": (5, 10**30)}, ["allowed_token_ids"]),
    ({"allowed_token_ids": (-1,)}, ["allowed_token_ids"]),
    ({"logit_bias": {VOCAB: 1}}, ["logit_bias"]),
    ({"logit_bias": {5: 100.1}}, ["logit_bias"]),
    ({"logit_bias": {5: math.nan}}, ["logit_bias"]),
    ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, ["logit_bias", "logit_bias"]),
    ({"bad_words": ("x",) * 1_000_000}, ["bad_words"]),
    ({"allowed_token_ids": (5,) * 1_000_000}, ["allowed_token_ids"]),
    ({"logprobs_mode": "raw_logits"}, ["logprobs_mode"]),
    *(({"id": bad}, ["request_id"]) for bad in ("", "a b", "x" * 129, "é", "a\n")),
    ({"constraint": Constraint("regex", "x" * 65537)}, ["response_format"]),
    ({"prompt": (5, VOCAB)}, ["token_ids"]),
    ({"prompt": ({"role": "", "content": "x"},)}, ["messages[0].role"]),
    ({"prompt": (USER, {"role": "boss", "content": "x"})}, ["messages[1].role"]),
    ({"prompt": ({"role": "tool", "content": "x"},)}, ["messages[0].tool_call_id"]),
    ({"prompt": (USER | {"tool_calls": [CALL]},)}, ["messages[0].tool_calls"]),
    ({"prompt": (USER | {"reasoning_content": "x"},)}, ["messages[0].reasoning_content"]),
    (
        {"prompt": (CALL_TURN | {"tool_calls": [CALL | {"function": {"name": "", "arguments": {}}}]},)},
        ["messages[0].tool_calls[0].function.name"],
    ),
    *(({"prompt": (USER,), "tools": (tool(bad),)}, ["tools[0].function.name"]) for bad in ("a b", "", "a\n")),
    ({"prompt": (USER,), "tools": (tool("f"),) * 129}, ["tools"]),
    ({"prompt": (USER,), "continue_final_message": True}, ["add_generation_prompt"]),
    (
        {"prompt": (USER | {"content": ""},), "continue_final_message": True, "add_generation_prompt": False},
        ["messages[0].content"],
    ),
    *(
        ({"chat_template_kwargs": {name: 1}}, [f"chat_template_kwargs.{name}"])
        for name in ("messages", "bos_token", "add_generation_prompt")
    ),
    *(
        ({"chat_template_kwargs": wrong}, ["chat_template_kwargs"])
        for wrong in ({"a b": 1}, {"_x": 1}, {f"a{n}": 1 for n in range(33)}, {"a": "x" * 65536})
    ),
]


@pytest.mark.parametrize(("fields", "where"), REFUSED)
def test_what_is_out_of_bounds_is_named(fields: dict[str, Any], where: list[str]) -> None:
    assert named(fields) == where


def test_more_ids_than_fit_are_too_long() -> None:
    """A list of ids is counted before it is looked at; one that is to be cut may be longer."""
    for fields in ({"prompt": (999,) * (LENGTH + 1)}, {"prompt": (5,) * 200_000, "truncate_prompt_tokens": 4}):
        with pytest.raises(PromptTooLong):
            named(fields)
    assert named({"prompt": (5,) * (LENGTH + 1), "truncate_prompt_tokens": 4}) == []
