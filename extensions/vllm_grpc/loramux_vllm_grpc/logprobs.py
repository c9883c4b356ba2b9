"""The number of log probabilities that fit into one message."""

from collections.abc import Sequence
from typing import Final

from inference_service.core.sequence import Token
from loramux_shared.faults import Finding, RequestInvalid

MOST: Final = 250_000
"""Numbers with their tokens: 3 MB. Clients take messages of 4 MB unless they say otherwise."""


def check_fits(tokens: Sequence[Token], where: str) -> None:
    """Refuse what the protocol has in a single message, where that would be too large.

    Raises:
        RequestInvalid: it would.
    """
    count = sum(1 + len(token.top) for token in tokens if token.logprob is not None)
    if count > MOST:
        finding = Finding(
            code="E_BAD_FIELD",
            where=where,
            expected=f"at most {MOST} log probabilities in one message",
            found=str(count),
            fix="Ask for fewer alternatives, or use loramux.inference.v1, which has several messages.",
        )
        raise RequestInvalid("the log probabilities do not fit into a message.", [finding])
