"""Files and batches as a store has them.

::

    OWNER/files/FILE.json                     a file; it is there when this is
    OWNER/pieces/FILE/TOKEN/00000             its bytes, in pieces
    OWNER/batches/BATCH.json                  a batch as it was created
    OWNER/work/BATCH/began.json               how many requests it has
    OWNER/work/BATCH/cancel.json              it was cancelled
    OWNER/work/BATCH/ended/EPOCH              how it ended; the highest epoch counts
    OWNER/work/BATCH/leases/EPOCH-TOKEN       who works on it; the highest epoch counts
    OWNER/work/BATCH/leases/EPOCH-TOKEN.over  and does so no longer
    OWNER/work/BATCH/parts/EPOCH-NUMBER-COMPLETED-FAILED    answers
    open/BATCH/OWNER                          empty; until it has ended

OWNER is made of the id of an API key. Every object but the marks and leases begins with a digest of its key and
of what follows, which is verified when it is read.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from inference_service.store import BatchesOpener
from loramux_shared import routes
from loramux_shared.access.asgi import App
from loramux_shared.access.guard import open_guard
from loramux_shared.access.shares import Shares
from loramux_shared.faults import BatchCorrupt, BatchNotFound, FileNotFound, RateLimited, RequestInvalid
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import ObjectMissing, Store

MIB: Final = 1 << 20
PIECE_BYTES: Final = 8 * MIB
MOST_FILE_BYTES: Final = 200 * MIB
MOST_BYTES: Final = 10_000 * MIB
"""Bytes of all files of a key."""
MOST_FILES: Final = 3000
UPLOADS: Final = 32
"""Files that a process receives at once, which keys share; each holds a piece in memory."""
MOST_OPEN: Final = 16
"""Batches of a key that have not ended."""
DAY_S: Final = 24 * 3600
KEPT_S: Final = 30 * DAY_S
"""Seconds for which a file is kept that says nothing else, and a batch."""
URLS: Final = tuple(
    route.path
    for route in (
        routes.CHAT_COMPLETIONS,
        routes.COMPLETIONS,
        routes.EMBEDDINGS,
        routes.RESPONSES,
        routes.CLASSIFY,
        routes.CLASSIFY_V1,
        routes.SCORE,
        routes.SCORE_V1,
        routes.RERANK,
        routes.RERANK_V1,
        routes.RERANK_V2,
    )
)
ID_BYTES: Final = 10
SIZE_OF_SEAL: Final = 65
R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """An object of the store that is JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StoredFile(Record):
    """A file."""

    id: str
    filename: str
    purpose: Literal["batch", "batch_output"]
    size: int
    """Bytes."""
    created_at: int
    expires_at: int
    pieces: tuple[str, ...]
    """Keys, in order."""

    @property
    def is_expired(self) -> bool:
        """Return True from its expiry on."""
        return self.expires_at <= time.time()


class LineError(Record):
    """Why a line of a batch, or all of it, is refused."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Creation(Record):
    """A batch as it was created."""

    id: str
    key_id: str
    """The API key that it belongs to; empty where the server has none."""
    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None
    created_at: int
    expires_at: int
    kept_s: int
    """Seconds for which its outputs are kept."""


class Beginning(Record):
    """The start of a batch whose lines are all requests."""

    total: int
    at: int


class Cancellation(Record):
    """A wish to end a batch."""

    at: int


class Ending(Record):
    """The end of a batch."""

    status: Literal["completed", "failed", "expired", "cancelled"]
    at: int
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: tuple[LineError, ...] = ()


class BatchState(Record):
    """All that the store has of a batch."""

    created: Creation
    began: Beginning | None
    cancelled: Cancellation | None
    ended: Ending | None
    completed: int
    failed: int


def owner_of(key_id: str) -> str:
    """Return the folder of a key: its id may be no name of a folder."""
    return f"of-{sha256(key_id.encode()).hexdigest()[:20]}"


def new_id(kind: Literal["file-", "batch_"]) -> str:
    """Return an id; ids are in the order of their creation."""
    return f"{kind}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(ID_BYTES)}"


def output_id(batch_id: str, kind: str) -> str:
    """Return the id of a file of a batch's answers, which is the same whenever they are stored again."""
    moment = batch_id.removeprefix("batch_")[:12]
    return f"file-{moment}{sha256(f'{batch_id}{kind}'.encode()).hexdigest()[: 2 * ID_BYTES]}"


def created_s(name: str) -> float:
    """Return when an id was made."""
    return int(re.split("[-_]", name)[1][:12], 16) / 1000


class BatchStore:
    """Files and batches in a store; methods block, and may be called by several threads at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.uploads = Shares(UPLOADS)
        """Used on the event loop alone."""
        self.changed: Callable[[], None] = lambda: None
        """Called when a batch was created or cancelled here; on any thread."""

    async def work(self, app: App, settings: InferenceSettings, max_queue: int) -> None:
        """Answer batches until cancelled; they have at most an eighth of the queue each."""
        from loramux_batches.work import MOST_REQUESTS, BatchWorker  # which imports this module

        at_once = max(1, min(MOST_REQUESTS, max_queue // 8))
        await BatchWorker(self, app, open_guard(settings).keyring, at_once).run()

    def read(self, key: str, kind: type[R]) -> R:
        """Return a record.

        Raises:
            ObjectMissing: there is none.
            BatchCorrupt: it is damaged.
        """
        try:
            return kind.model_validate_json(self.unsealed(key))
        except ValidationError as error:
            raise _corrupt(self.store.uri, key) from error

    def find(self, key: str, kind: type[R]) -> R | None:
        """Return a record, or None when there is none."""
        try:
            return self.read(key, kind)
        except ObjectMissing:
            return None

    def write(self, key: str, record: Record) -> None:
        """Store a record."""
        self.seal(key, record.model_dump_json().encode())

    def seal(self, key: str, data: bytes) -> None:
        """Store bytes behind the digest of their key and of themselves."""
        self.store.put(key, _seal(key, data) + data)

    def unsealed(self, key: str) -> bytes:
        """Return stored bytes.

        Raises:
            ObjectMissing: there are none.
            BatchCorrupt: they are not those that were stored.
        """
        found = self.store.get(key)
        data = found[SIZE_OF_SEAL:]
        if found[:SIZE_OF_SEAL] != _seal(key, data):
            raise _corrupt(self.store.uri, key)
        return data

    def file(self, owner: str, file_id: str, *, expired: bool = False) -> StoredFile:
        """Return a file of an owner, one that has expired only where that is wanted.

        Raises:
            FileNotFound: there is none.
        """
        found = self.find(f"{owner}/files/{file_id}.json", StoredFile) if _is_id(file_id) else None
        if found is None or (found.is_expired and not expired):
            raise FileNotFound(f"no file {file_id[:80]!r} of this key. GET /v1/files lists those that exist.")
        return found

    def files(self, owner: str) -> list[str]:
        """Return the ids of an owner's files, the oldest first."""
        return self._ids(f"{owner}/files/")

    def check_room(self, owner: str, least: int = 1) -> int:
        """Return the bytes that an owner may still store, at least so many.

        Raises:
            RateLimited: there are less, or too many files.
        """
        used = sum(entry.size for entry in self.store.entries(f"{owner}/pieces/"))
        if MOST_BYTES - used < least or len(self.files(owner)) >= MOST_FILES:
            raise RateLimited(
                f"the files of this key take {used} bytes: expected less than {MOST_BYTES}, and at most "
                f"{MOST_FILES} files. Delete some, or wait until they expire."
            )
        return MOST_BYTES - used

    def pieces(self, file: StoredFile) -> Iterator[bytes]:
        """Yield the bytes of a file."""
        return map(self.unsealed, file.pieces)

    def delete_file(self, owner: str, file_id: str) -> None:
        """Remove a file.

        Raises:
            FileNotFound: there is none.
            RequestInvalid: a batch that has not ended reads it.
        """
        self.file(owner, file_id)
        for batch_id in self.open(owner):
            if self._input_of((batch_id, owner)) == file_id:
                raise RequestInvalid(
                    f"{file_id} is read by {batch_id}, which has not ended. Cancel that first."
                )
        self.remove_file(owner, file_id)

    def remove_file(self, owner: str, file_id: str) -> None:
        """Remove a file, or what is there of it."""
        self.store.delete(f"{owner}/files/{file_id}.json")
        self._delete_all(f"{owner}/pieces/{file_id}/")

    def create(self, owner: str, created: Creation) -> None:
        """Store a batch, which replicas begin with soon.

        Raises:
            RateLimited: too many batches of the owner have not ended.
        """
        many = RateLimited(
            f"{MOST_OPEN} batches of this key have not ended. Wait for one, or cancel one.", retry_after_s=60
        )
        if len(list(self.open(owner))) >= MOST_OPEN:
            raise many
        keys = f"{owner}/batches/{created.id}.json", f"open/{created.id}/{owner}"
        self.write(keys[0], created)
        self.store.put(keys[1], b"")
        if len(list(self.open(owner))) > MOST_OPEN:  # others were created at the same moment
            for key in reversed(keys):
                self.store.delete(key)
            raise many
        self.changed()

    def open(self, owner: str) -> Iterator[str]:
        """Yield the ids of an owner's batches that have not ended."""
        return (batch_id for batch_id, of in self.all_open() if of == owner)

    def all_open(self) -> list[tuple[str, str]]:
        """Return all batches that have not ended, and their owners, the oldest first."""
        keys = (key.split("/") for key in self.store.list("open/"))
        return [(parts[1], parts[2]) for parts in keys if len(parts) == 3]

    def batches(self, owner: str) -> list[str]:
        """Return the ids of an owner's batches, the oldest first."""
        return self._ids(f"{owner}/batches/")

    def batch(self, owner: str, batch_id: str) -> BatchState:
        """Return a batch of an owner.

        Raises:
            BatchNotFound: there is none.
        """
        created = self.find(f"{owner}/batches/{batch_id}.json", Creation) if _is_id(batch_id) else None
        if created is None:
            raise BatchNotFound(
                f"no batch {batch_id[:80]!r} of this key. GET /v1/batches lists those that exist."
            )
        work = work_key(owner, batch_id)
        names = [key.removeprefix(work) for key in self.store.list(work)]

        def found(name: str, kind: type[R]) -> R | None:
            present = [each for each in names if each.startswith(name)]
            return self.find(work + present[-1], kind) if present else None

        began, ended = found("began.json", Beginning), found("ended/", Ending)
        counted = [tuple(map(int, name.split("-")[2:])) for name in names if name.startswith("parts/")]
        completed, failed = (sum(counts) for counts in zip((0, 0), *counted, strict=True))
        return BatchState(
            created=created,
            began=began,
            cancelled=found("cancel.json", Cancellation),
            ended=ended,
            completed=ended.completed if ended else completed,
            failed=ended.failed if ended else failed,
        )

    def cancel(self, owner: str, batch_id: str) -> BatchState:
        """Have a batch end, and return it.

        Raises:
            BatchNotFound: there is none.
            RequestInvalid: it has ended.
        """
        state = self.batch(owner, batch_id)
        if state.ended is not None:
            raise RequestInvalid(
                f"{batch_id} is {state.ended.status}: expected a batch that has not ended, to cancel it."
            )
        if state.cancelled is None:
            self.write(work_key(owner, batch_id) + "cancel.json", Cancellation(at=int(time.time())))
            self.changed()
        return self.batch(owner, batch_id)

    def end(self, owner: str, batch_id: str, epoch: int, ending: Ending) -> None:
        """Store the end of a batch; its parts and leases are not needed any more."""
        work = work_key(owner, batch_id)
        self.write(f"{work}ended/{epoch:06d}", ending)
        self.store.delete(f"open/{batch_id}/{owner}")
        for folder in ("parts/", "leases/"):
            self._delete_all(work + folder)

    def sweep(self) -> None:
        """Remove files and batches that have expired, and pieces of uploads that were broken off.

        Records that are damaged leave with those that are as old.
        """
        now, opened = time.time(), self.all_open()
        in_use = set(map(self._input_of, opened))
        entries = [entry for entry in self.store.entries("of-") if entry.key.count("/") >= 2]
        places = [entry.key.removesuffix(".json").split("/")[:3] for entry in entries]
        files = {name for _, kind, name in places if kind == "files"}
        for entry, (owner, kind, name) in zip(entries, places, strict=True):
            if kind == "files":
                with suppress(BatchCorrupt):
                    found = self.find(entry.key, StoredFile)
                    if found is not None and found.is_expired and name not in in_use:
                        self.remove_file(owner, name)
                    continue
            broken_off = kind == "pieces" and name not in files and now - entry.modified.timestamp() > DAY_S
            if broken_off or (kind in ("files", "batches", "work") and _is_old(name, now)):
                self.store.delete(entry.key)
        for batch_id, owner in opened:
            if _is_old(batch_id, now):
                self.store.delete(f"open/{batch_id}/{owner}")

    def _input_of(self, opened: tuple[str, str]) -> str:
        batch_id, owner = opened
        with suppress(BatchCorrupt):  # it reads no file
            created = self.find(f"{owner}/batches/{batch_id}.json", Creation)
            return "" if created is None else created.input_file_id
        return ""

    def _ids(self, prefix: str) -> list[str]:
        return [key.removeprefix(prefix).removesuffix(".json") for key in self.store.list(prefix)]

    def _delete_all(self, prefix: str) -> None:
        for key in list(self.store.list(prefix)):
            self.store.delete(key)


class Pieces:
    """A file that is being written, piece by piece."""

    def __init__(self, batches: BatchStore, owner: str, file_id: str) -> None:
        self._batches = batches
        self._owner = owner
        self._prefix = f"{owner}/pieces/{file_id}/{secrets.token_hex(4)}"
        self._data = bytearray()
        self._keys: list[str] = []
        self.size = 0

    def add(self, part: bytes) -> None:
        """Add bytes; a piece that they complete is stored."""
        self._data += part
        self.size += len(part)
        while len(self._data) >= PIECE_BYTES:
            self._put(bytes(self._data[:PIECE_BYTES]))
            del self._data[:PIECE_BYTES]

    def close(self, file: StoredFile) -> StoredFile:
        """Store the rest, then the file."""
        if self._data:
            self._put(bytes(self._data))
        whole = file.model_copy(update={"pieces": tuple(self._keys), "size": self.size})
        self._batches.write(f"{self._owner}/files/{file.id}.json", whole)
        return whole

    def discard(self) -> None:
        """Remove what was stored."""
        for key in self._keys:
            self._batches.store.delete(key)

    def _put(self, data: bytes) -> None:
        key = f"{self._prefix}/{len(self._keys):05d}"
        self._keys.append(key)
        self._batches.seal(key, data)


def new_file(filename: str, purpose: Literal["batch", "batch_output"], kept_s: int) -> StoredFile:
    """Return a file that has no bytes yet."""
    now = int(time.time())
    return StoredFile(
        id=new_id("file-"),
        filename=filename,
        purpose=purpose,
        size=0,
        created_at=now,
        expires_at=now + kept_s,
        pieces=(),
    )


def work_key(owner: str, batch_id: str) -> str:
    """Return the beginning of the keys of what is done for a batch."""
    return f"{owner}/work/{batch_id}/"


def _is_old(name: str, now: float) -> bool:
    return now - created_s(name) > KEPT_S + DAY_S


def _is_id(name: str) -> bool:
    return re.fullmatch(r"(file-|batch_)[0-9a-f]{32}", name) is not None


def _seal(key: str, data: bytes) -> bytes:
    return sha256(key.encode() + b"\n" + data).hexdigest().encode() + b"\n"


def _corrupt(uri: str, key: str) -> BatchCorrupt:
    return BatchCorrupt(
        f"{uri}: {key} is not what was stored there. It is not used: check who can write to the store, "
        "and send the file or the batch again."
    )


BATCHES: Final = BatchesOpener(BatchStore)
