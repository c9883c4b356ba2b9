"""The rules of a gRPC server about calls: the scope of their key.

And the calls that monitors repeat all the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from loramux_shared import routes
from loramux_shared.access.rights import Scope


@dataclass(frozen=True)
class Rules:
    """The rules of some services."""

    scopes: Mapping[str, Scope | None] = field(default_factory=dict)
    """Scopes of keys by service, or by method (``package.Service/Method``), which comes first; None: any key.

    A service that is not named needs admin.
    """
    keyless: tuple[str, ...] = ()
    """Prefixes of the paths of calls that need no key."""
    untraced: frozenset[str] = frozenset()
    """Paths of calls that make no spans."""

    def __add__(self, other: Rules) -> Rules:
        """Return the rules of the services of both."""
        return Rules(
            {**self.scopes, **other.scopes}, self.keyless + other.keyless, self.untraced | other.untraced
        )


CORE: Final = Rules(routes.SCOPES, keyless=("/grpc.health.v1.Health/",))
