"""Pages of a list of names."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from builder_service.builds.views import DeploymentView
from loramux_shared.bundle.deployments import is_deployment_name
from loramux_shared.faults import PageTokenInvalid

PAGE: Final = 100
MAX_PAGE: Final = 1000
UNKNOWN_PAGE: Final = "page_token: use the next_page_token of the last answer"


@dataclass(frozen=True)
class Page:
    """A part of the list of deployments."""

    views: tuple[DeploymentView, ...]
    next_token: str
    """Empty on the last page."""


@dataclass(frozen=True)
class Names:
    """The names of a page."""

    names: Sequence[str]
    next_token: str


def names_of_page(names: Sequence[str], page_size: int, page_token: str) -> Names:
    """Return the names of a page out of all of them, in order; page_size 0 means `PAGE`.

    Raises:
        PageTokenInvalid: no page has this token.
    """
    after = _name_in(page_token)
    left = [name for name in names if name > after]
    size = min(page_size or PAGE, MAX_PAGE)
    return Names(left[:size], _token(left[size - 1]) if len(left) > size else "")


def _token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _name_in(token: str) -> str:
    if not token:
        return ""
    try:
        name = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise PageTokenInvalid(UNKNOWN_PAGE) from error
    if not is_deployment_name(name):
        raise PageTokenInvalid(UNKNOWN_PAGE)
    return name
