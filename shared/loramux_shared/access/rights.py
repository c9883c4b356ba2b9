"""Scopes, and the rights of a caller."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from loramux_shared.limits import Limits


class Scope(StrEnum):
    """A set of calls that a key allows."""

    INFER = "infer"
    """Generate, and list the models."""
    BUILD = "build"
    """Everything that the builder does, reads included: they name what others train."""
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
