"""The work of a replica on batches: it takes one, answers its requests, and stores how it ended."""

import asyncio
import json
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import structlog

from loramux_batches.batch import Batch, error_line
from loramux_batches.records import (
    PIECE_BYTES,
    BatchStore,
    Beginning,
    Creation,
    Ending,
    LineError,
    Pieces,
    new_file,
    output_id,
    owner_of,
    work_key,
)
from loramux_shared.access.keyring import Keyring
from loramux_shared.access.keys import ACCESS, EVERYTHING, Access
from loramux_shared.access.shares import Shares
from loramux_shared.faults import BatchCorrupt, Fault, FileNotFound, Finding, RequestInvalid, StoreUnavailable
from loramux_shared.process import working_folder
from loramux_shared.rpc.stopping import wait_at_most
from loramux_shared.storage.base import ObjectMissing

log = structlog.get_logger()

LOOK_S: Final = 10.0
"""Seconds between two looks for batches that nobody works on."""
BEAT_S: Final = 2.0
"""Seconds between two looks at whether a batch that is worked on was cancelled."""
STORE_S: Final = 30.0
"""Longest time between two parts of answers; a batch that began lately has shorter ones."""
LEASE_S: Final = 60.0
"""Seconds after which a lease that was not renewed ends, on the clock of the replica that sees it."""
SWEEP_S: Final = 3600.0
AT_ONCE: Final = 4
"""Batches that a replica works on, which keys share."""
MOST_REQUESTS: Final = 128
"""Requests of a batch that are open at once, at most."""
MOST_LINES: Final = 50_000
FOLDER: Final = "loramux-batch-"
STOP_S: Final = 10.0
"""Seconds in which a replica that ends stores the last answers."""
EXPIRED: Final = "the request was not answered within the completion window."
UNREADABLE: Final = "the file is not there, or is not what was stored: upload it again."


@dataclass
class Job:
    """A batch that this replica works on, with the lease that allows it."""

    owner: str
    created: Creation
    epoch: int
    """Number of the lease; the highest one of a batch counts."""
    lease: str
    """Key of the lease."""
    renewed_s: float
    """When the lease was put last, on the worker's clock."""
    folder: Path = Path()
    stored: int = 0
    """Bytes of the answers that are in the store."""
    parts: int = 0
    storing: threading.Lock = field(default_factory=threading.Lock)
    """Held while answers are stored, which goes on in its thread where its task was cancelled."""
    over: Literal["", "cancelled", "expired", "lost", "completed"] = ""
    """Why the other requests are not sent; empty: they are."""

    @property
    def work(self) -> str:
        """Return the beginning of the keys of its work."""
        return work_key(self.owner, self.created.id)

    @property
    def source(self) -> Path:
        """Return the file of requests."""
        return self.folder / "in.jsonl"

    @property
    def answers(self) -> Path:
        """Return the file of answers."""
        return self.folder / "out.jsonl"


@dataclass
class BatchWorker:
    """Works on the batches of a store until it is cancelled. Used on the event loop alone."""

    batches: BatchStore
    app: Callable[..., Any]
    """Answers requests (ASGI)."""
    keyring: Keyring | None
    at_once: int = MOST_REQUESTS
    """Requests of a batch that are open at once."""
    lease_s: float = LEASE_S
    beat_s: float = BEAT_S
    clock: Callable[[], float] = time.monotonic
    _token: str = field(default_factory=lambda: secrets.token_hex(8))
    _jobs: dict[str, tuple[str, asyncio.Task[bool]]] = field(default_factory=dict)
    """Owners and tasks, by batch."""
    _places: Shares = field(default_factory=lambda: Shares(AT_ONCE))
    _seen: dict[str, tuple[tuple[str, datetime], float]] = field(default_factory=dict)
    """The newest lease of each batch with its time in the store, and when it was first seen here."""
    _damaged: set[str] = field(default_factory=set)
    """Batches that are logged as damaged."""

    async def run(self) -> None:
        """Look for batches every few seconds, and when one was created here; sweep every hour."""
        loop, nudged, swept_s = asyncio.get_running_loop(), asyncio.Event(), self.clock()

        def nudge() -> None:
            loop.call_soon_threadsafe(nudged.set)

        self.batches.changed = nudge
        try:
            while True:
                nudged.clear()
                try:
                    await self.look()
                    if self.clock() - swept_s > SWEEP_S:
                        swept_s = self.clock()
                        await asyncio.to_thread(self.batches.sweep)
                except Fault as fault:
                    log.warning("batches are not looked at", reason=fault.reason, problem=fault.message)
                pause_s = min(LOOK_S, self.lease_s) * random.uniform(0.7, 1.3)  # noqa: S311 - no secret
                await wait_at_most(pause_s, nudged)
        finally:
            tasks = [task for _, task in self._jobs.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def look(self) -> None:
        """Begin with batches that nobody works on: first those of keys with the fewest here, then the oldest.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        opened = await asyncio.to_thread(self.batches.all_open)
        self._seen = {batch_id: self._seen[batch_id] for batch_id, _ in opened if batch_id in self._seen}
        waiting = [each for each in opened if each[0] not in self._jobs]
        while waiting := [each for each in waiting if self._places.may_take(_key_of(each[1]))]:
            busy = Counter(owner for owner, _ in self._jobs.values())
            batch_id, owner = first = min(waiting, key=lambda each: (busy[each[1]], each[0]))
            waiting.remove(first)
            try:
                job = await asyncio.to_thread(self.take, owner, batch_id)
            except BatchCorrupt as fault:
                if batch_id not in self._damaged:
                    log.warning(
                        "batch is not begun", batch=batch_id, reason=fault.reason, problem=fault.message
                    )
                self._damaged.add(batch_id)
                continue
            if job is not None:
                task = asyncio.create_task(self._work(job), name=batch_id)
                self._jobs[batch_id] = owner, task
                self._places.take(_key_of(owner))
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[bool]) -> None:
        owner, _ = self._jobs.pop(task.get_name())
        self._places.give_back(_key_of(owner))
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("batch is interrupted", batch=task.get_name(), exc_info=error)
        elif task.result():  # another try waits for the next look
            self.batches.changed()

    def take(self, owner: str, batch_id: str) -> Job | None:
        """Take a lease on a batch, unless another replica has one that it renews.

        A lease is put, and all are listed: of two replicas that put one of the same number, the later sees the
        other's and gives way; both may. This needs no conditional write (decision 3).
        """
        store, folder = self.batches.store, f"{work_key(owner, batch_id)}leases/"
        created = self.batches.find(f"{owner}/batches/{batch_id}.json", Creation)
        if created is None or not (self._rights(created) or created.expires_at <= time.time()):
            return None
        newest = max(store.entries(folder), key=lambda entry: entry.key, default=None)
        if newest is not None and not newest.key.endswith(".over"):
            lease = newest.key, newest.modified
            if self._seen.get(batch_id, (None, 0.0))[0] != lease:
                self._seen[batch_id] = lease, self.clock()
            if self.clock() - self._seen[batch_id][1] < self.lease_s:
                return None
        epoch = 1 if newest is None else _epoch(newest.key) + 1
        job = Job(owner, created, epoch, f"{folder}{epoch:06d}-{self._token}", self.clock())
        store.put(job.lease, b"")
        if any(key != job.lease and _epoch(key) >= epoch for key in store.list(folder)):
            store.delete(job.lease)
            return None
        return job

    async def _work(self, job: Job) -> bool:
        """Work on a batch until this replica ends or loses the lease; returns True at the batch's end."""
        name = job.created.id
        with working_folder(FOLDER) as job.folder:
            try:
                log.info("batch begins", batch=name, key=job.created.key_id, epoch=job.epoch)
                ending = await self._answer(job)
                if ending is not None and not await asyncio.to_thread(self._is_lost, job):
                    await asyncio.to_thread(self.batches.end, job.owner, name, job.epoch, ending)
                    job.over = "completed"
                    counts = {"completed": ending.completed, "failed": ending.failed}
                    log.info("batch ended", batch=name, status=ending.status, **counts)
            except Fault as fault:
                log.warning("batch is interrupted", batch=name, reason=fault.reason, problem=fault.message)
            finally:
                if job.over not in ("completed", "lost"):
                    with suppress(TimeoutError, StoreUnavailable):
                        async with asyncio.timeout(STOP_S):
                            await asyncio.to_thread(self._leave, job)
        return job.over == "completed"

    async def _answer(self, job: Job) -> Ending | None:
        """Answer what is not answered yet; returns how the batch ends, None where another replica goes on."""
        endpoint = job.created.endpoint
        try:
            state = await asyncio.to_thread(self.batches.batch, job.owner, job.created.id)
            if state.ended is not None:  # and a replica was killed before it had cleared up
                return state.ended
            await asyncio.to_thread(self._fetch, job)
            batch = await asyncio.to_thread(Batch, job.source, job.answers, urls=(endpoint,), attempts=None)
        except RequestInvalid as fault:
            return _failed(*map(_line_error, fault.findings))
        except (FileNotFound, BatchCorrupt, ObjectMissing):
            return _failed(LineError(code="file_unreadable", message=UNREADABLE, param="input_file_id"))
        total = batch.counts.total
        if not 0 < total <= MOST_LINES:
            message = f"expected 1 to {MOST_LINES} requests, found {total}."
            return _failed(LineError(code="invalid_request_count", message=message, param="input_file_id"))
        if state.began is None:
            began = Beginning(total=total, at=int(time.time()))
            await asyncio.to_thread(self.batches.write, f"{job.work}began.json", began)
        access = self._rights(job.created)
        await self._beat(job)
        if access is not None and not job.over:
            await self._send(job, batch, access)
        if not job.over and batch.counts.left:
            return None  # the key is gone
        return None if job.over == "lost" else await asyncio.to_thread(self._finish, job, batch)

    async def _send(self, job: Job, batch: Batch, access: Access) -> None:
        """Send requests until all are answered, or the batch is over."""
        ACCESS.set(replace(access, background=True))
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=None) as http:  # noqa: S113
            sending = asyncio.create_task(batch.run(http, self.at_once, lambda: None))
            try:
                began_s = stored_s = self.clock()
                while not (sending.done() or job.over) and self._rights(job.created):
                    await asyncio.wait([sending], timeout=self.beat_s)
                    now_s = self.clock()
                    due = now_s - stored_s >= min(STORE_S, (now_s - began_s) / 10)
                    await self._beat(job, store=due)
                    stored_s = now_s if due else stored_s
                if sending.done():
                    sending.result()
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _beat(self, job: Job, *, store: bool = False) -> None:
        """Store new answers, renew the lease, and see whether the batch is over."""
        try:
            if store:
                await asyncio.to_thread(self._store, job)
            if await asyncio.to_thread(self._is_lost, job):
                job.over = "lost"
            elif await asyncio.to_thread(lambda: list(self.batches.store.list(f"{job.work}cancel.json"))):
                job.over = "cancelled"
            elif job.created.expires_at <= time.time():
                job.over = "expired"
            if self.clock() - job.renewed_s >= self.lease_s / 3:
                now_s = self.clock()
                await asyncio.to_thread(self.batches.store.put, job.lease, b"")
                job.renewed_s = now_s
        except StoreUnavailable as fault:
            log.warning("answers of a batch are not stored", batch=job.created.id, problem=fault.message)
            if self.clock() - job.renewed_s >= self.lease_s * 2 / 3:
                job.over = "lost"

    def _is_lost(self, job: Job) -> bool:
        return any(_epoch(key) > job.epoch for key in self.batches.store.list(f"{job.work}leases/"))

    def _rights(self, created: Creation) -> Access | None:
        """Return the rights of the key that a batch belongs to; None where this replica does not know it."""
        if self.keyring is None:
            return None if created.key_id else EVERYTHING
        return self.keyring.rights_of(created.key_id)

    def _fetch(self, job: Job) -> None:
        """Bring the requests here, and the answers that are stored: of each request the first one.

        Raises:
            FileNotFound: the requests are not there.
            BatchCorrupt: they are damaged; damaged answers are left out, and their requests answered again.
        """
        file = self.batches.file(job.owner, job.created.input_file_id, expired=True)
        with job.source.open("wb") as source:
            source.writelines(self.batches.pieces(file))
        seen: set[str] = set()
        with job.answers.open("wb") as answers:
            for key in list(self.batches.store.list(f"{job.work}parts/")):
                try:
                    lines = self.batches.unsealed(key).splitlines(keepends=True)
                except BatchCorrupt as fault:
                    log.warning("answers are sent for again", batch=job.created.id, problem=fault.message)
                    continue
                for line in lines:
                    custom_id = json.loads(line)["custom_id"]  # noqa: TID251 - a line of ours
                    if custom_id not in seen:
                        seen.add(custom_id)
                        answers.write(line)
        job.stored = job.answers.stat().st_size

    def _store(self, job: Job) -> None:
        """Store the answers that are not stored yet."""
        with job.storing, job.answers.open("rb") as answers:
            answers.seek(job.stored)
            for lines in _chunks(answers):
                failed = sum(map(_is_failed, lines))
                name = f"{job.epoch:06d}-{job.parts:06d}-{len(lines) - failed}-{failed}"
                self.batches.seal(f"{job.work}parts/{name}", b"".join(lines))
                job.parts += 1
                job.stored += sum(map(len, lines))

    def _finish(self, job: Job, batch: Batch) -> Ending:
        """Store the answers as files, in place of those that a killed replica stored, and return the ending."""
        kept_s, name, now = job.created.kept_s, job.created.id, int(time.time())
        files = {
            kind: new_file(f"{name}_{kind}.jsonl", "batch_output", kept_s).model_copy(
                update={"id": output_id(name, kind)}
            )
            for kind in ("output", "error")
        }
        pieces = {kind: Pieces(self.batches, job.owner, file.id) for kind, file in files.items()}
        counts = Counter[str]()

        def add(kind: str, line: bytes) -> None:
            pieces[kind].add(line)
            counts[kind] += 1

        with job.answers.open("rb") as answers:
            for line in answers:
                add("error" if _is_failed(line) else "output", line)
        if job.over == "expired":
            for request in batch.unanswered():
                add("error", error_line(request.custom_id, "batch_expired", EXPIRED))
        ids = {kind: pieces[kind].close(file).id for kind, file in files.items() if counts[kind]}
        return Ending(
            status=job.over if job.over in ("expired", "cancelled") else "completed",
            at=now,
            completed=counts["output"],
            failed=counts["error"],
            output_file_id=ids.get("output"),
            error_file_id=ids.get("error"),
        )

    def _leave(self, job: Job) -> None:
        """Store what is answered, and let another replica go on at once."""
        if job.answers.exists():
            self._store(job)
        self.batches.store.put(f"{job.lease}.over", b"")


def _key_of(owner: str) -> str:
    """Return what stands for an owner's API key; empty: batches without one."""
    return "" if owner == owner_of("") else owner


def _epoch(key: str) -> int:
    return int(key.rpartition("/")[2][:6])


def _chunks(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Yield whole lines in lists of about a piece's bytes."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        if not line.endswith(b"\n"):  # it is being written
            break
        chunk.append(line)
        size += len(line)
        if size >= PIECE_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _is_failed(line: bytes) -> bool:
    response = json.loads(line)["response"]  # noqa: TID251 - a line of ours
    return response is None or not 200 <= response["status_code"] < 300


def _failed(*errors: LineError) -> Ending:
    return Ending(status="failed", at=int(time.time()), errors=errors)


def _line_error(finding: Finding) -> LineError:
    """Return the error of a finding, whose place is ``line 3, body.stream``."""
    place, _, param = finding.where.partition(", ")
    message = f"expected {finding.expected}, found {finding.found}"
    return LineError(code="invalid_line", message=message, param=param or None, line=int(place.split()[1]))
