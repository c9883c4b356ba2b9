"""The field tables of the APIs, which are their bodies: a row is a field with type, note and noun.

The noun is the field of a request that a field of a body is. From it follow what a request takes over from a
body, the names in faults, and the bounds in `openapi`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel

from inference_service.chat.request import naming
from inference_service.http.wire.body import Body

T = TypeVar("T")


@dataclass(frozen=True)
class Noun:
    """The field of a request that a body's field becomes."""

    name: str = ""
    """Empty: the one of the same name."""
    also: tuple[str, ...] = ()
    """Other fields that faults name where this one is meant."""
    taken: bool = True
    """True if a request has its value as it is; else the API's mapping converts it."""


Same = Annotated[T, Noun()]
"""A field that a request has under the same name."""
Made = Annotated[T, Noun(taken=False)]
"""The same, where the mapping makes something of its value."""


@dataclass(frozen=True)
class FieldRow:
    """A field of a body, or of an object within it."""

    path: tuple[str, ...]
    noun: str
    also: tuple[str, ...]
    taken: bool

    @property
    def wire(self) -> str:
        """Return the client's name of it."""
        return ".".join(self.path)

    def value(self, body: BaseModel) -> Any:
        """Return what a body says; None where nothing."""
        value: Any = body
        for name in self.path:
            value = None if value is None else getattr(value, name)
        return value


@cache
def table(kind: type[BaseModel]) -> tuple[FieldRow, ...]:
    """Return the rows of a body that have a noun."""
    return tuple(_rows(kind))


def _rows(kind: type[BaseModel]) -> Iterator[FieldRow]:
    for name, field in kind.model_fields.items():
        nouns = [each for each in field.metadata if isinstance(each, Noun)]
        for noun in nouns:
            yield FieldRow((name,), noun.name or name, noun.also, noun.taken)
        for held in get_args(field.annotation) if not nouns else ():
            if isinstance(held, type) and issubclass(held, BaseModel):
                for row in table(held):
                    yield FieldRow((name, *row.path), row.noun, row.also, row.taken)


def request_fields(body: Body) -> dict[str, Any]:
    """Return what a request takes over from a body, by its own fields; what is not set is left out."""
    rows = ((row.noun, row.value(body)) for row in table(type(body)) if row.taken)
    return {noun: value for noun, value in rows if value is not None}


def names(body: Body) -> dict[str, str]:
    """Return what a client calls the fields of requests in a body; of two names the one that it set."""
    rows = table(type(body))
    found: dict[str, str] = {}
    for row in (*(row for row in rows if row.value(body) is not None), *rows):
        for noun in (row.noun, *row.also):
            found.setdefault(noun, row.wire)
    return found


def in_words_of(body: Body) -> AbstractContextManager[None]:
    """Name fields in faults as a body does."""
    known = names(body)
    return naming(lambda where: known.get(where, where))
