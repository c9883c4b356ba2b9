"""API keys as they are kept: one JSON object a line, with the key's digest in place of the key.

A key holds 256 random bits, so there is no dictionary to try and a plain sha256 is as good as a slow hash,
which would only make every call slow.
"""

import hashlib
import secrets
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loramux_shared.faults import SettingsInvalid
from loramux_shared.runtime import Limits


class Scope(StrEnum):
    """A set of calls that a key allows."""

    INFER = "infer"
    """Generate, and list the models."""
    BUILD = "build"
    """Everything that the builder does, reads included: they name what others train."""
    RESOLVE = "resolve"
    """Add adapters to a deployment by naming their repositories, where the deployment allows it."""
    METRICS = "metrics"
    """Read `/metrics`, which names every model and tells how much it is used."""
    ADMIN = "admin"
    """Everything."""


@dataclass(frozen=True)
class Access:
    """The rights of one call."""

    key_id: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    """The served names that inference is limited to; None: all."""
    limits: Limits | None = None
    """Limits of the key on each replica."""
    background: bool = False
    """True for requests of batches, which have what others leave."""

    def may(self, scope: Scope) -> bool:
        """True where this scope is among the rights."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def may_use(self, model: str) -> bool:
        """True where this model is not hidden."""
        return self.models is None or model in self.models


EVERYTHING = Access("", frozenset({Scope.ADMIN}))
"""The rights of every caller where keys are off."""

ACCESS: ContextVar[Access] = ContextVar("access", default=EVERYTHING)
"""The rights of the call that runs. The server sets them, and the catalog hides models by them."""


PREFIX = "lmx_"
"""Prefix of every key, so that scanners of repositories and logs can find one that leaked."""
KEY_BYTES = 32

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]


class KeyEntry(BaseModel):
    """One key: everything but the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    id: Name
    """Names the key in lists and messages; distinct."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key's characters, in hex."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """The served names that `infer` is limited to; the key does not see others."""
    limits: Limits | None = None
    """Limits of the key on each replica, for `infer`."""
    comment: str = ""
    created: datetime | None = None

    @model_validator(mode="after")
    def _limits_need_infer(self) -> Self:
        if (self.models or self.limits) and (Scope.INFER not in self.scopes or Scope.ADMIN in self.scopes):
            raise ValueError("models and limits only with the scope infer and without admin")
        return self

    @property
    def access(self) -> Access:
        """The rights of who has the key."""
        models = None if self.models is None else frozenset(self.models)
        return Access(self.id, frozenset(self.scopes), models, self.limits)

    def line(self) -> str:
        """Return the entry as a line of a keys file, without its end."""
        return self.model_dump_json(exclude_defaults=True)


def new_key() -> str:
    """Return a random key."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest(key: str) -> bytes:
    """Return the sha256 of a key, or of whatever was presented as one."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def parse_keys(text: str, where: str) -> list[KeyEntry]:
    """Return the entries of a keys file or variable; empty lines and those that begin with ``#`` say nothing.
    Raise SettingsInvalid with every bad line, and repeat nothing of it: it may be a key.
    """
    entries: list[KeyEntry] = []
    wrong: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entries.append(KeyEntry.model_validate_json(line))
        except ValidationError as error:
            wrong += [f"line {number}: {problem}" for problem in explain(error)]
    for field in ("id", "sha256"):
        if _twice(getattr(entry, field) for entry in entries):
            wrong.append(f"two entries have the same {field}")
    if wrong:
        raise SettingsInvalid(f"{where}: {'; '.join(wrong)}. `loramux keys new` prints such a line.")
    return entries


def explain(error: ValidationError) -> list[str]:
    """Return what is wrong with an entry, field by field, and nothing of its values."""
    return [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), _expected(item["type"], item["msg"]))))
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]


def _expected(kind: str, message: str) -> str:
    if kind in ("json_invalid", "model_type"):
        return "expected a JSON object with id, sha256 and scopes"
    return message.removeprefix("Value error, ").replace("Input should be", "expected")


def _twice(values: Iterable[str]) -> bool:
    listed = list(values)
    return len(set(listed)) < len(listed)
