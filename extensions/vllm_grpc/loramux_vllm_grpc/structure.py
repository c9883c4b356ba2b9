"""The constraint of an answer in vLLM's messages."""

import re
from collections.abc import Sequence
from typing import Any, Final

from inference_service.core.constraint import Constraint, Kind
from loramux_shared.faults import Finding, RequestInvalid

KINDS: Final[dict[str, Kind]] = {
    "json": "json_schema",
    "json_schema": "json_schema",
    "regex": "regex",
    "grammar": "gbnf",
}
"""Kinds by the field that holds the text."""


def constraint_of(kind: str | None, value: Any, path: str) -> Constraint | None:
    """Return a constraint from the field of a oneof that is set, if one is; path stands before its name.

    Raises:
        RequestInvalid: there is nothing to choose from.
    """
    where = f"{path}.{kind}"
    if kind is None or value is False:
        return None
    if kind == "json_object":
        return Constraint("json_object", "", where)
    if kind == "choice":
        return Constraint("regex", _one_of(value.choices, where), where)
    return Constraint(KINDS[kind], value, where)


def _one_of(choices: Sequence[str], where: str) -> str:
    if not choices or not all(choices):
        finding = Finding(code="E_BAD_FIELD", where=where, expected="texts of which none is empty", found="one")
        raise RequestInvalid("the request has no choices.", [finding])
    return "|".join(map(re.escape, choices))
