"""The client's half of changes: adapters in and out of a deployment, generations back and forth.

::

    with Client() as client:
        client.push("my-model", "support", "./trained")           # serves it in seconds
        client.update("my-model", {"legal": "org/legal@v2"}, remove=["old"])
        client.rollback("my-model")
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Final, TypeAlias

from loramux.builder.v1 import builder_pb2 as pb
from loramux.mapping import adapter_of, deployment_of, record_of
from loramux.messages import adapters_to_message
from loramux.records import AdapterInfo, DeploymentInfo
from loramux.requests import fitted
from loramux.steps import Ask, Steps
from loramux_shared.adapter_files import CONFIG, PIECE, WEIGHTS, holds_weights, pieces_of, wanted_files
from loramux_shared.deployment import Repository
from loramux_shared.faults import RequestInvalid
from loramux_shared.spelling import parse_repository


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


def _change(message: pb.AdapterChange) -> AdapterChange:
    if not message.digest_before:
        kind = ChangeKind.ADDED
    else:
        kind = ChangeKind.CHANGED if message.digest else ChangeKind.REMOVED
    return AdapterChange(message.name, kind, message.digest, message.digest_before)


PUSH_TIMEOUT_S: Final = 600.0
"""A push sends the adapter, and waits until it is published."""
BESIDE: Final = ("README.md", "model.sig")
"""Files that are sent of a folder, though no bundle is made from them."""
MAX_OTHERS: Final = 1000
"""Names of other files that a builder looks at."""

Adapters: TypeAlias = Mapping[str, Repository | str]
"""Repositories by the names of adapters, or words for them; see `loramux_shared.spelling`."""
Files: TypeAlias = Path | str | Mapping[str, bytes]
"""A folder as a deployment file may name one, or the contents of its files by their names."""


def _messages(deployment: str, name: str, expected: int | None, files: Files) -> Iterator[pb.PutAdapterRequest]:
    """Return the messages of an upload, which read the files piece by piece. Before the first message, raise
    RequestInvalid where there is no such folder, or a file of it may not be read.
    """
    others: list[str] = []
    if isinstance(files, Mapping):
        contents = _of_memory(files)
    else:
        contents, others = _of_folder(Path(files).expanduser())
    upload = fitted(
        pb.AdapterUpload,
        deployment=deployment,
        name=name,
        expected_generation=expected or 0,
        other_files=others,
    )
    return chain([pb.PutAdapterRequest(upload=upload)], map(_chunk, contents))


def _chunk(piece: tuple[str, bytes]) -> pb.PutAdapterRequest:
    file, data = piece
    return pb.PutAdapterRequest(chunk=pb.FileChunk(file="" if file == WEIGHTS else file, data=data))


def _of_memory(files: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for file, data in sorted(files.items(), key=lambda item: holds_weights(item[0])):
        for at in range(0, len(data), PIECE):
            yield file, data[at : at + PIECE]


def _of_folder(folder: Path) -> tuple[Iterator[tuple[str, bytes]], list[str]]:
    """Return the pieces of what a builder would fetch of a folder, weights last, and the names of the rest."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "none"
        raise RequestInvalid(f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}, found {found}.")
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
        below = [f"{path.parent.name}/{CONFIG}" for path in folder.glob(f"*/{CONFIG}")]
    except OSError as error:
        raise RequestInvalid(f"{folder}: {error.strerror}. Make it readable.") from error
    selected = sorted(
        {*wanted_files(names), *BESIDE}.intersection(names), key=lambda name: (holds_weights(name), name)
    )
    paths = [folder / name for name in selected]
    if locked := [path for path in paths if not os.access(path, os.R_OK)]:
        raise RequestInvalid(f"{locked[0]}: it may not be read. Make it readable.")
    others = sorted(filter(str.isprintable, {*names, *below}.difference(selected)))[:MAX_OTHERS]
    return ((path.name, piece) for path in paths for piece in pieces_of(path)), others


class Changes:
    """The calls of a client that change a deployment."""

    timeout_s: float | None

    def update(
        self,
        name: str,
        add: Adapters | None = None,
        remove: Iterable[str] = (),
        *,
        expected_generation: int | None = None,
        must_be_new: bool = False,
        request_id: str | None = None,
    ) -> Steps[DeploymentInfo]:
        """Start an update, which adds, replaces and removes adapters; returns at once.

        Updates of one deployment run one after the other, and waiting ones become one generation: watch with
        the request_id for the end of this one. It is refused if expected_generation is not the newest, or, with
        must_be_new, if an adapter to add exists.
        """
        repositories = {
            adapter: parse_repository(each) if isinstance(each, str) else each
            for adapter, each in (add or {}).items()
        }
        request = fitted(
            pb.UpdateDeploymentRequest,
            name=name,
            add=adapters_to_message(repositories),
            remove=list(remove),
            expected_generation=expected_generation or 0,
            must_be_new=must_be_new,
            request_id=request_id or "",
        )
        answer = yield Ask("builder", "UpdateDeployment", request, self.timeout_s)
        return deployment_of(answer.deployment)

    def push(
        self,
        deployment: str,
        name: str,
        files: Files,
        *,
        expected_generation: int | None = None,
        timeout_s: float | None = PUSH_TIMEOUT_S,
    ) -> Steps[PushInfo]:
        """Upload an adapter; returns when its generation is published."""
        messages = _messages(deployment, name, expected_generation, files)
        answer = yield Ask("builder", "PutAdapter", messages, timeout_s)
        return record_of(PushInfo, answer, adapter=adapter_of(answer.adapter))

    def rollback(
        self, name: str, to: int | None = None, *, expected_generation: int | None = None
    ) -> Steps[RollbackInfo]:
        """Publish an older generation again; by default the one before the newest."""
        request = fitted(
            pb.RollbackDeploymentRequest, name=name, to=to or 0, expected_generation=expected_generation or 0
        )
        answer = yield Ask("builder", "RollbackDeployment", request, self.timeout_s)
        return record_of(RollbackInfo, answer, restored=answer.restored or None)

    def history(self, name: str, limit: int | None = None) -> Steps[list[GenerationInfo]]:
        """Return the generations of a deployment, the newest first; at most so many."""
        found: list[GenerationInfo] = []
        token = ""
        while limit is None or len(found) < limit:
            left = limit and limit - len(found)
            size = min(left or 0, 100)
            request = fitted(pb.ListGenerationsRequest, name=name, page_token=token, page_size=size)
            answer = yield Ask("builder", "ListGenerations", request, self.timeout_s)
            found += [
                record_of(GenerationInfo, each, changes=tuple(map(_change, each.changes)))
                for each in answer.generations
            ]
            token = answer.next_page_token
            if not token:
                break
        return found
