"""Requests to a builder beside whole deployments; kept in the journal while they run."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from loramux_shared.bundle.names import Name, StoredName
from loramux_shared.deployment import Model, Repository


class Update(Model):
    """Adapters that come into a deployment, take the place of others, or leave it."""

    name: StoredName
    """The deployment's."""
    add: dict[Name, Repository] = Field(default_factory=dict)
    """Adapters by name; one that is there is replaced."""
    remove: tuple[StoredName, ...] = ()
    expected_generation: int | None = Field(default=None, ge=1)
    """The newest one when this is published; None: whatever it is."""
    must_be_new: bool = Field(default=False, exclude_if=lambda new: not new)
    """Refuse it where the deployment has one of the adapters that are added."""

    @property
    def touched(self) -> frozenset[str]:
        """The adapters that it changes."""
        return frozenset((*self.add, *self.remove))

    @model_validator(mode="after")
    def _says_something(self) -> Update:
        if not self.add and not self.remove:
            raise ValueError("an adapter to add or to remove")
        if both := sorted(self.add.keys() & set(self.remove)):
            raise ValueError(f"adapters to add and others to remove, unlike {both[0]}")
        return self


def joined(wishes: Sequence[Update]) -> Update:
    """Return changes of a deployment as one; they touch different adapters and agree on the rest."""
    add = {name: repository for wish in wishes for name, repository in wish.add.items()}
    remove = tuple(name for wish in wishes for name in wish.remove)
    return wishes[0].model_copy(update={"add": add, "remove": remove})
