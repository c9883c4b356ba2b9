"""Checks of the command `schemathesis` for this API, beside its own."""

from typing import Any

import schemathesis
from schemathesis.checks import CheckContext

REFUSED_UNREAD = "the body of the request is not valid."
"""Beginning of a refusal of a body that is not of the described form; other refusals are of rules."""
BETWEEN_FIELDS = "the same as"
"""Part of such a refusal that is of a rule after all, which JSON Schema has no words for."""


@schemathesis.check
def is_as_described(ctx: CheckContext, response: Any, case: Any) -> None:
    """A body that the document allows breaks at most a rule between fields: no field or type is refused."""
    positive = case.meta is not None and case.meta.generation.mode.is_positive
    if positive and response.status_code == 400:
        message = response.json()["error"]["message"]
        assert BETWEEN_FIELDS in message or not message.startswith(REFUSED_UNREAD), message


@schemathesis.check
def says_which_request(ctx: CheckContext, response: Any, case: Any) -> None:
    """Check that every answer has its id, and no detail of the server's code."""
    assert len(response.headers["x-request-id"][0]) > 0
    assert "Traceback" not in response.text
