"""Pages of the names of deployments, and of a deployment's generations with what changed in each."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar

from builder_service.builds.views import served_number
from loramux_shared.bundle.claims import generation_numbers
from loramux_shared.bundle.deployments import is_deployment_name, read_generation, stored_deployments
from loramux_shared.bundle.generation import Generation
from loramux_shared.faults import BundleCorrupt, DeploymentNotFound, PageTokenInvalid
from loramux_shared.storage.base import Store
from loramux_shared.wording import is_whole

T = TypeVar("T")
PAGE: Final = 100
MAX_PAGE: Final = 1000
UNKNOWN_PAGE: Final = "page_token: use the next_page_token of the last answer"


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list."""

    items: Sequence[T]
    next_token: str
    """Empty on the last page."""


def names_of_page(names: Sequence[str], page_size: int, page_token: str) -> Page[str]:
    """Return the names of a page out of all of them, in order; page_size 0 means `PAGE`. Raise PageTokenInvalid
    for a token of no page.
    """
    after = _name_in(page_token)
    left = [name for name in names if name > after]
    size = min(page_size or PAGE, MAX_PAGE)
    return Page(left[:size], _token(left[size - 1]) if len(left) > size else "")


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


GENERATIONS: Final = 20
MAX_GENERATIONS: Final = 100
MAX_CHANGES: Final = 1000
"""Largest number of changes of one generation that are listed."""


@dataclass(frozen=True)
class ChangedAdapter:
    """The change of an adapter between two generations; a digest is absent where the adapter was."""

    name: str
    digest: str = ""
    before: str = ""


@dataclass(frozen=True)
class GenerationView:
    """A generation beside the one before it that is still there."""

    number: int
    create_time: datetime | None
    served: bool
    adapters: int = 0
    changes: tuple[ChangedAdapter, ...] = ()
    """The first changes, by name."""
    change_count: int = 0
    other_settings: bool = False
    damage: str = ""


def history(store: Store, name: str, page_size: int, page_token: str) -> Page[GenerationView]:
    """Return a page of a deployment's generations, the newest first; page_size 0 means `GENERATIONS`. Blocks.

    Raises:
        DeploymentNotFound, PageTokenInvalid, StoreUnavailable
    """
    if page_token and not is_whole(page_token):
        raise PageTokenInvalid(UNKNOWN_PAGE)
    numbers = generation_numbers(store, name) if is_deployment_name(name) else []
    if not numbers:
        raise DeploymentNotFound(f"no deployment {name[:128]!r}; there are {stored_deployments(store)}")
    left = [number for number in reversed(numbers) if not page_token or number < int(page_token)]
    page = left[: min(page_size or GENERATIONS, MAX_GENERATIONS)]
    served = served_number(store, name)
    views, after = list[GenerationView](), _read(store, name, page[0]) if page else None
    for number, below in zip(page, [*left[1:], None], strict=False):
        before = _read(store, name, below) if below is not None else None
        views.append(_view(number, after, before, served))
        after = before
    return Page(views, str(page[-1]) if len(left) > len(page) else "")


def _view(
    number: int, generation: Generation | str | None, before: Generation | str | None, served: int
) -> GenerationView:
    if not isinstance(generation, Generation):
        return GenerationView(number, None, number == served, damage=generation or "it is gone")
    older = before if isinstance(before, Generation) else None
    changes = _changes(generation, older)
    same = ("adapters", "number", "create_time", "changes")
    settings = {name: getattr(generation, name) for name in same}
    return GenerationView(
        number,
        generation.create_time,
        number == served,
        len(generation.adapters),
        tuple(changes[:MAX_CHANGES]),
        len(changes),
        older is not None and older.model_copy(update=settings) != generation,
    )


def _changes(generation: Generation, before: Generation | None) -> list[ChangedAdapter]:
    now = {name: record.digest for name, record in generation.adapters.items()}
    then = {name: record.digest for name, record in before.adapters.items()} if before else {}
    return [
        ChangedAdapter(name, now.get(name, ""), then.get(name, ""))
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]


def _read(store: Store, name: str, number: int) -> Generation | str:
    """Return a generation, or why it cannot be read."""
    try:
        return read_generation(store, name, number)
    except BundleCorrupt as damage:
        return damage.message
