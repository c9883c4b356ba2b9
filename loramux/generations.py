"""Client records of a deployment's changes: pushes, rollbacks, generations."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from loramux.builder.v1 import builder_pb2 as pb
from loramux.mapping import adapter_of, time_of
from loramux.records import AdapterInfo


class ChangeKind(StrEnum):
    """The change of an adapter between two generations."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


@dataclass(frozen=True)
class AdapterChange:
    """A change of an adapter between two generations."""

    name: str
    kind: ChangeKind
    digest: str
    """sha256 of the bundle's manifest, in hex; empty where it was removed."""
    digest_before: str
    """Empty where it was added."""


@dataclass(frozen=True)
class GenerationInfo:
    """A generation of a deployment."""

    number: int
    create_time: datetime | None
    served: bool
    adapters: int
    """Number of its adapters."""
    changes: tuple[AdapterChange, ...]
    """Against the one before that is still there, by name; the first 1,000."""
    change_count: int
    other_settings: bool
    """True if its base or a setting is another than before."""
    damage: str
    """Why it cannot be read; empty: it can."""


@dataclass(frozen=True)
class PushInfo:
    """An adapter that was pushed."""

    digest: str
    """sha256 of the bundle's manifest, in hex."""
    generation: int
    """Generation that serves it."""
    unchanged: bool
    """True if it was there already."""
    adapter: AdapterInfo


@dataclass(frozen=True)
class RollbackInfo:
    """The result of a rollback."""

    generation: int
    unchanged: bool
    """True if that was served already."""
    restored: int | None
    """The older generation whose content it is; None: the builder is older, and does not say."""


def generation_of(message: pb.Generation) -> GenerationInfo:
    """Return a generation."""
    return GenerationInfo(
        number=message.number,
        create_time=time_of(message.create_time),
        served=message.served,
        adapters=message.adapters,
        changes=tuple(map(_change, message.changes)),
        change_count=message.change_count,
        other_settings=message.other_settings,
        damage=message.damage,
    )


def push_of(message: pb.PutAdapterResponse) -> PushInfo:
    """Return what came of a push."""
    return PushInfo(message.digest, message.generation, message.unchanged, adapter_of(message.adapter))


def rollback_of(message: pb.RollbackDeploymentResponse) -> RollbackInfo:
    """Return what came of a rollback."""
    return RollbackInfo(message.generation, message.unchanged, message.restored or None)


def _change(message: pb.AdapterChange) -> AdapterChange:
    if not message.digest_before:
        kind = ChangeKind.ADDED
    else:
        kind = ChangeKind.CHANGED if message.digest else ChangeKind.REMOVED
    return AdapterChange(message.name, kind, message.digest, message.digest_before)
