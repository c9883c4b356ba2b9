"""Hooks of the command `schemathesis` for this API: `SCHEMATHESIS_HOOKS` names this file's module."""

from typing import Any

import requests
import schemathesis
from schemathesis.checks import CheckContext

REFUSED_UNREAD = "the body of the request is not valid."
"""Beginning of a refusal of a body that is not of the described form; other refusals are of rules."""
BETWEEN_FIELDS = "the same as"
"""Part of such a refusal that is of a rule after all, which JSON Schema has no words for."""


MAX_N, MAX_TOKENS = 128, 2**31
FEW = {
    "n": (2, MAX_N),
    "max_tokens": (8, MAX_TOKENS),
    "max_completion_tokens": (8, MAX_TOKENS),
    "max_output_tokens": (8, MAX_TOKENS),
}
"""Fields that cost time: how much is asked at most, of values that may be asked at all."""


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Ask for little."""
    if isinstance(case.body, dict):
        case.body = {name: _few(name, value) for name, value in case.body.items()}


def _few(name: str, value: Any) -> Any:
    little, most = FEW.get(name, (0, 0))
    return little if type(value) in (int, float) and little < value <= most else value


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Go on after a pause: the next request would wait."""
    if case.path == "/pause" and response.status_code == 200:
        url = response.request.url.partition("/pause")[0] + "/resume"
        requests.post(url, headers={"authorization": response.request.headers["Authorization"]}, timeout=120)


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
