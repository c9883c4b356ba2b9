"""``/v1/files`` and ``/v1/batches`` as OpenAI has them.

https://platform.openai.com/docs/api-reference/files and https://platform.openai.com/docs/api-reference/batch
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Annotated, Final, Literal, TypeVar

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from typing_extensions import TypedDict

from inference_service.api.http.endpoint import Endpoint, Routes
from inference_service.api.http.wire.body import Body, Query, read_body, read_query
from inference_service.api.http.wire.reply import Reply
from inference_service.api.requests.bounds import refused
from inference_service.api.requests.service import GenerationService
from loramux_batches.records import (
    DAY_S,
    KEPT_S,
    MIB,
    MOST_FILE_BYTES,
    URLS,
    BatchState,
    BatchStore,
    Creation,
    Pieces,
    StoredFile,
    new_file,
    new_id,
    owner_of,
)
from loramux_batches.upload import Form
from loramux_shared import routes
from loramux_shared.access.keys import ACCESS
from loramux_shared.faults import BatchCorrupt, BatchNotFound, FileNotFound
from loramux_shared.rpc.stopping import shielded
from loramux_shared.settings import variable

FILE_PAGE: Final = 100
BATCH_PAGE: Final = 20
OCTETS: Final = "application/octet-stream"
READS: Final = 16
"""Records of a page that are read at once."""
OTHER_FIELDS: Final = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
T = TypeVar("T")
Seconds = Annotated[int, Field(ge=3600, le=KEPT_S)]


class Expiry(Body):
    """When a file expires."""

    anchor: Literal["created_at"]
    seconds: Seconds


class BatchBody(Body):
    """A batch to create."""

    input_file_id: str
    """A file with purpose ``batch``."""
    endpoint: str
    """The route of all requests of the file."""
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: Expiry | None = None
    """When the files of answers expire; 30 days after they are there by default."""


class FileForm(Body):
    """A file to store, as a form."""

    media_type = "multipart/form-data"
    file: Annotated[str, Field(json_schema_extra={"contentMediaType": OCTETS})]
    purpose: Literal["batch"]
    anchor: Annotated[Literal["created_at"], Field(alias="expires_after[anchor]")] = "created_at"
    seconds: Annotated[Seconds, Field(alias="expires_after[seconds]")] = KEPT_S
    """When the file expires."""


class FilesQuery(Query):
    """The choice of files in a list."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = FILE_PAGE
    after: str | None = None
    """The last id of the page before."""
    order: Literal["asc", "desc"] = "desc"
    purpose: Literal["batch", "batch_output"] | None = None


class BatchesQuery(Query):
    """The choice of batches in a list."""

    limit: Annotated[int, Field(ge=1, le=100)] = BATCH_PAGE
    after: str | None = None
    """The last id of the page before."""


class FileObject(TypedDict):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileDeleted(TypedDict):
    """A file that was deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class FileList(TypedDict):
    """A page of files."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(TypedDict):
    """Why a batch failed."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(TypedDict):
    """Why a batch failed."""

    object: Literal["list"]
    data: list[BatchError]


class BatchCounts(TypedDict):
    """The requests of a batch."""

    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal["validating", "failed", "in_progress", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """A page of batches."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def create_file(service: GenerationService, http: HttpRequest) -> Reply[FileObject]:
    """Store a file of requests for a batch: a form with `file` and `purpose`."""
    batches = _store(service)
    with batches.uploads.held(ACCESS.get().key_id, "files that are being uploaded"):
        return Reply(_file(await _create_file(batches, http)))


async def _create_file(batches: BatchStore, http: HttpRequest) -> StoredFile:
    owner = _owner()
    room = min(MOST_FILE_BYTES, await asyncio.to_thread(batches.check_room, owner))
    file = new_file("", "batch", KEPT_S)
    pieces = Pieces(batches, owner, file.id)
    try:
        filename, kept_s = await _receive(http, pieces, room)
        await asyncio.to_thread(batches.check_room, owner, -MIB)  # uploads at the same time saw the same room
    except BaseException:
        await shielded(asyncio.to_thread(pieces.discard))
        raise
    named = file.model_copy(update={"filename": filename[:512], "expires_at": file.created_at + kept_s})
    return await asyncio.to_thread(pieces.close, named)


async def list_files(service: GenerationService, http: HttpRequest) -> Reply[FileList]:
    """Return the files of the key, the newest first."""
    batches, owner, query = _store(service), _owner(), read_query(http, FilesQuery)
    ids = await asyncio.to_thread(batches.files, owner)
    found = await _read([partial(batches.file, owner, each) for each in ids])
    chosen = [each for each in found if query.purpose in (None, each.purpose)]
    page, more = _page({each.id: each for each in chosen}, query.after, query.limit, query.order == "desc")
    first, last = _ends([each.id for each in page])
    return Reply(
        {"object": "list", "data": [*map(_file, page)], "first_id": first, "last_id": last, "has_more": more}
    )


async def get_file(service: GenerationService, http: HttpRequest) -> Reply[FileObject]:
    """Return a file, without its bytes."""
    return Reply(_file(await asyncio.to_thread(_store(service).file, _owner(), _id(http))))


async def get_file_content(service: GenerationService, http: HttpRequest) -> StreamingResponse:
    """Return the bytes of a file."""
    batches = _store(service)
    file = await asyncio.to_thread(batches.file, _owner(), _id(http))
    first = await asyncio.to_thread(next, batches.pieces(file), b"")

    async def pieces() -> AsyncIterator[bytes]:
        yield first
        for key in file.pieces[1:]:
            yield await asyncio.to_thread(batches.unsealed, key)

    headers = {"content-length": str(file.size), "content-type": OCTETS}
    return StreamingResponse(pieces(), headers=headers)


async def delete_file(service: GenerationService, http: HttpRequest) -> Reply[FileDeleted]:
    """Delete a file."""
    await asyncio.to_thread(_store(service).delete_file, _owner(), _id(http))
    return Reply({"id": _id(http), "object": "file", "deleted": True})


async def create_batch(service: GenerationService, http: HttpRequest) -> Reply[BatchObject]:
    """Have the requests of a file answered within a day, when no others wait."""
    body = await read_body(http, BatchBody)
    batches, owner = _store(service), _owner()
    if body.endpoint not in URLS:
        raise refused("endpoint", f"one of {', '.join(URLS)}", body.endpoint)
    file = await asyncio.to_thread(batches.file, owner, body.input_file_id)
    if file.purpose != "batch":
        raise refused("input_file_id", "a file with purpose batch", file.purpose)
    now = int(time.time())
    created = Creation(
        id=new_id("batch_"),
        key_id=ACCESS.get().key_id,
        input_file_id=file.id,
        endpoint=body.endpoint,
        metadata=body.metadata,
        created_at=now,
        expires_at=now + DAY_S,
        kept_s=body.output_expires_after.seconds if body.output_expires_after else KEPT_S,
    )
    await asyncio.to_thread(batches.create, owner, created)
    return Reply(_batch(await asyncio.to_thread(batches.batch, owner, created.id)))


async def list_batches(service: GenerationService, http: HttpRequest) -> Reply[BatchList]:
    """Return the batches of the key, the newest first."""
    batches, owner, query = _store(service), _owner(), read_query(http, BatchesQuery)
    ids = await asyncio.to_thread(batches.batches, owner)
    page, more = _page({each: each for each in ids}, query.after, query.limit, newest_first=True)
    found = await _read([partial(batches.batch, owner, each) for each in page])
    first, last = _ends(page)
    return Reply(
        {"object": "list", "data": [*map(_batch, found)], "first_id": first, "last_id": last, "has_more": more}
    )


async def get_batch(service: GenerationService, http: HttpRequest) -> Reply[BatchObject]:
    """Return a batch."""
    return Reply(_batch(await asyncio.to_thread(_store(service).batch, _owner(), _id(http))))


async def cancel_batch(service: GenerationService, http: HttpRequest) -> Reply[BatchObject]:
    """Have a batch end; what is answered stays."""
    return Reply(_batch(await asyncio.to_thread(_store(service).cancel, _owner(), _id(http))))


_endpoint = partial(Endpoint, reads_prompts=True)
ROUTES: Final = Routes(
    (
        _endpoint(routes.FILES, list_files, query=FilesQuery, fails=(404,)),
        _endpoint(routes.CREATE_FILE, create_file, FileForm, fails=(404, 413, 415, 429)),
        _endpoint(routes.FILE, get_file, fails=(404,)),
        _endpoint(routes.DELETE_FILE, delete_file, fails=(404,)),
        _endpoint(routes.FILE_CONTENT, get_file_content, text=OCTETS, fails=(404,)),
        _endpoint(routes.BATCHES, list_batches, query=BatchesQuery, fails=(404,)),
        _endpoint(routes.CREATE_BATCH, create_batch, BatchBody, fails=(404, 429)),
        _endpoint(routes.BATCH, get_batch, fails=(404,)),
        _endpoint(routes.CANCEL_BATCH, cancel_batch, fails=(404,)),
    )
)
"""An API process answers them itself: all that they need is in the store."""


def _store(service: GenerationService) -> BatchStore:
    if not isinstance(service.batches, BatchStore):
        raise FileNotFound(
            f"this server keeps no files and batches. Start it with {variable('batch_store')}, or run the file "
            "with `loramux run-batch`."
        )
    return service.batches


async def _receive(http: HttpRequest, pieces: Pieces, room: int) -> tuple[str, int]:
    """Store the file of a form; returns its name, and for how many seconds it is kept."""
    form = Form(http.headers.get("content-type", ""), OTHER_FIELDS, pieces, room)
    async for data in http.stream():
        await asyncio.to_thread(form.write, data)
    form.close()
    if form.filename is None:
        raise refused("file", "a file", "none")
    return form.filename, _checked_fields(form.fields)


def _owner() -> str:
    return owner_of(ACCESS.get().key_id)


def _id(http: HttpRequest) -> str:
    return str(http.path_params["id"])


async def _read(reads: list[Callable[[], T]]) -> list[T]:
    """Return what several reads return, in their order; what was removed or is damaged is left out."""
    places = asyncio.Semaphore(READS)

    async def one(read: Callable[[], T]) -> list[T]:
        async with places:
            with suppress(FileNotFound, BatchNotFound, BatchCorrupt):
                return [await asyncio.to_thread(read)]
        return []

    return [each for found in await asyncio.gather(*map(one, reads)) for each in found]


def _page(items: dict[str, T], after: str | None, limit: int, newest_first: bool) -> tuple[list[T], bool]:
    """Return a page of items by id, and whether there are more."""
    ids = sorted(items, reverse=newest_first)
    if after is not None:
        ids = [each for each in ids if (each < after if newest_first else each > after)]
    return [items[each] for each in ids[:limit]], len(ids) > limit


def _ends(ids: list[str]) -> tuple[str | None, str | None]:
    return (ids[0], ids[-1]) if ids else (None, None)


def _checked_fields(fields: dict[str, str]) -> int:
    """Return the seconds for which an uploaded file is kept."""
    if fields.get("purpose") != "batch":
        raise refused("purpose", "batch", fields.get("purpose", "none"))
    anchor, seconds = (fields.get(name) for name in OTHER_FIELDS[1:])
    if anchor is seconds is None:
        return KEPT_S
    if anchor != "created_at":
        raise refused("expires_after[anchor]", "created_at", anchor or "none")
    if not (seconds or "").isdecimal() or not 3600 <= int(seconds or "") <= KEPT_S:
        raise refused("expires_after[seconds]", f"3600 to {KEPT_S}", seconds or "none")
    return int(seconds or "")


def _file(file: StoredFile) -> FileObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def _batch(state: BatchState) -> BatchObject:
    created, began, ended, cancelled = state.created, state.began, state.ended, state.cancelled
    total = began.total if began else 0
    ended_at = {ended.status: ended.at} if ended else {}
    failed = min(state.failed, total)
    under_way: Literal["cancelling", "in_progress", "validating"] = "in_progress" if began else "validating"
    if cancelled:
        under_way = "cancelling"
    errors: list[BatchError] = [
        {"code": each.code, "message": each.message, "param": each.param, "line": each.line}
        for each in (ended.errors if ended else ())
    ]
    return {
        "id": created.id,
        "object": "batch",
        "endpoint": created.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": created.input_file_id,
        "completion_window": "24h",
        "status": ended.status if ended else under_way,
        "output_file_id": ended.output_file_id if ended else None,
        "error_file_id": ended.error_file_id if ended else None,
        "created_at": created.created_at,
        "in_progress_at": began.at if began else None,
        "expires_at": created.expires_at,
        "completed_at": ended_at.get("completed"),
        "failed_at": ended_at.get("failed"),
        "expired_at": ended_at.get("expired"),
        "cancelling_at": cancelled.at if cancelled else None,
        "cancelled_at": ended_at.get("cancelled"),
        "request_counts": {"total": total, "completed": min(state.completed, total - failed), "failed": failed},
        "metadata": created.metadata,
    }
