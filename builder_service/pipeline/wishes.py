"""What a builder is asked for beside whole deployments; kept in the journal while it runs."""

from __future__ import annotations

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

    @model_validator(mode="after")
    def _says_something(self) -> Update:
        if not self.add and not self.remove:
            raise ValueError("an adapter to add or to remove")
        if both := sorted(self.add.keys() & set(self.remove)):
            raise ValueError(f"adapters to add and others to remove, unlike {both[0]}")
        return self
