"""The bounds of a request's fields, which every API checks in one place."""

import math
from typing import Any

import pytest

from inference_service.api.requests.bounds import check
from inference_service.core.constraint import Constraint
from inference_service.core.request import Request
from loramux_shared.faults import PromptTooLong, RequestInvalid
from tests.support.cases import cases

USER = {"role": "user", "content": "x"}
VOCAB, QUEUE, LENGTH = 199, 64, 256


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def named(fields: dict[str, Any]) -> list[str]:
    fields = {"prompt": (5, 6)} | {name: _tuple(value) for name, value in fields.items()}
    try:
        check(Request.of("base", **fields), VOCAB, QUEUE, LENGTH)
    except RequestInvalid as fault:
        return [finding.where for finding in fault.findings]
    return []


def test_a_length_below_nothing_is_one_fault() -> None:
    """A wrong length has one finding, with its own name."""
    assert named({"max_tokens": -1}) == ["max_tokens"]
    assert named({"max_tokens": 2, "min_tokens": 3}) == ["min_tokens"]


@pytest.mark.parametrize(
    ("name", "low", "high", "step"), cases(__file__, "test_a_number_is_taken_up_to_its_bounds")
)
def test_a_number_is_taken_up_to_its_bounds(name: str, low: float, high: float, step: float) -> None:
    """A number at a bound is accepted; a step beyond it, and NaN, are refused by name."""
    assert named({name: low}) == named({name: high}) == []
    beyond = [low - step, *([high + step] if high < 2**70 else []), *([math.nan] * (step < 1))]
    assert [named({name: number}) for number in beyond] == [[name]] * len(beyond)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"temperature": math.inf}, ["temperature"]),
    ({"bad_words": ("x",) * 1025}, ["bad_words"]),
    ({"allowed_token_ids": (5, 10**30)}, ["allowed_token_ids"]),
    ({"logit_bias": {VOCAB: 1}}, ["logit_bias"]),
    ({"logit_bias": {5: 100.1}}, ["logit_bias"]),
    ({"logit_bias": {5: math.nan}}, ["logit_bias"]),
    ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, ["logit_bias", "logit_bias"]),
    ({"bad_words": ("x",) * 1_000_000}, ["bad_words"]),
    ({"allowed_token_ids": (5,) * 1_000_000}, ["allowed_token_ids"]),
    ({"constraint": Constraint("regex", "x" * 65537)}, ["response_format"]),
    ({"prompt": (USER,), "tools": (tool("f"),) * 129}, ["tools"]),
    *(
        ({"chat_template_kwargs": wrong}, ["chat_template_kwargs"])
        for wrong in ({"a b": 1}, {"_x": 1}, {f"a{n}": 1 for n in range(33)}, {"a": "x" * 65536})
    ),
]


@pytest.mark.parametrize(
    ("fields", "where"), [*REFUSED, *cases(__file__, "test_what_is_out_of_bounds_is_named")]
)
def test_what_is_out_of_bounds_is_named(fields: dict[str, Any], where: list[str]) -> None:
    """Every field that is out of bounds is named."""
    assert named(fields) == where


def test_more_ids_than_fit_are_too_long() -> None:
    """A list of ids is counted before it is looked at; one that is to be cut may be longer."""
    for fields in ({"prompt": (999,) * (LENGTH + 1)}, {"prompt": (5,) * 200_000, "truncate_prompt_tokens": 4}):
        with pytest.raises(PromptTooLong):
            named(fields)
    assert named({"prompt": (5,) * (LENGTH + 1), "truncate_prompt_tokens": 4}) == []
