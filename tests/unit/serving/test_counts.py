"""Counts in constraints, which are judged before a library sees them."""

import json

import pytest

from inference_service.driver.counts import MOST, MOST_UP_TO, too_many
from tests.support.cases import cases

MANY = MOST + 1


@pytest.mark.parametrize(
    "pattern", [*cases(__file__, "test_patterns_that_unfold_to_too_much"), f"a{{{'9' * 5000}}}"]
)
def test_patterns_that_unfold_to_too_much(pattern: str) -> None:
    """Counts are multiplied where they are nested, and added where they are beside each other."""
    assert "characters or more" in (too_many("regex", pattern) or "")
    assert too_many("json_schema", json.dumps({"items": [{"pattern": pattern}]}))
    assert too_many("json_schema", json.dumps({"patternProperties": {pattern: {}}}))
    assert too_many("lark", f"start: /{pattern}/")


@pytest.mark.parametrize(
    "pattern",
    [
        f"[a-z]{{1,{MOST}}}", "(a{100}){100}", "[{999999}]", r"\{999999}", "a{999999", "{999999",
        "(ab|c){3}[0-9]?",
    ],
)  # fmt: skip
def test_patterns_that_do_not(pattern: str) -> None:
    """A brace in a class or behind a backslash is a character."""
    assert too_many("regex", pattern) is None


def test_numbers_of_a_schema() -> None:
    """Lower bounds are counts; upper bounds may be the largest number of 32 bits, which stands for any."""
    for key in ("minLength", "minItems", "minProperties", "minContains"):
        found = too_many("json_schema", json.dumps({"$defs": {"a": {"anyOf": [{key: MANY}]}}}))
        assert found == f"{key}: {MANY}, more than {MOST}"
    for key in ("maxLength", "maxItems", "maxProperties", "maxContains"):
        assert too_many("json_schema", json.dumps({key: MOST_UP_TO})) is None
        assert too_many("json_schema", json.dumps({key: MOST_UP_TO + 1}))


@pytest.mark.parametrize(
    ("kind", "text", "refused"),
    [
        *cases(__file__, "test_repeats_of_grammars"),
        ("lark", f'start: "a"{{{MANY}}}', True),
        ("lark", f'start: "a" ~ 1..{MANY}', True),
        ("gbnf", f'root ::= "a"{{{MANY}}}', True),
    ],
)
def test_repeats_of_grammars(kind: str, text: str, refused: bool) -> None:
    """Repeats count in rules and in their patterns and schemas, but not in literals and comments."""
    assert (too_many(kind, text) is not None) == refused
