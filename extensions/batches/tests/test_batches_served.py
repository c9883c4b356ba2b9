"""`/v1/files` and `/v1/batches`: OpenAI's client, several replicas, and what interrupts them."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from openai import AsyncOpenAI, BadRequestError, InternalServerError, NotFoundError, RateLimitError
from starlette.requests import Request
from starlette.responses import JSONResponse

from inference_service.api.http.app import create_app
from loramux_batches import records, work
from loramux_batches.records import BatchStore, Creation, new_file, owner_of
from loramux_batches.work import BatchWorker
from loramux_shared.access.keyring import Keyring
from loramux_shared.faults import StoreUnavailable
from loramux_shared.storage.base import Store
from loramux_shared.storage.memory import MemoryStore
from loramux_shared.storage.open import open_store
from tests.contract.conftest import aws as aws, store as store
from tests.support.access import lines, new_entry
from tests.support.cases import cases
from tests.support.openai_api import open_api, openai_world
from tests.support.processes.forks import Forked
from tests.support.processes.inference import run_inference
from tests.support.services.silent import silent_service
from tests.support.tiny import make_world
from tests.support.waiting import BOUND_S, until
from tests.support.web import web_client

CHAT = "/v1/chat/completions"


def line(custom_id: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}) + "\n"


class Echo:
    """An application that answers so many requests with their own bodies, and lets others wait."""

    def __init__(self, most: int = 1000) -> None:
        self.asked: list[str] = []
        self.most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or wait for ever."""
        body = await Request(scope, receive).json()
        self.asked.append(body["n"])
        if len(self.asked) > self.most:
            await asyncio.Event().wait()
        await JSONResponse(body, 400 if body.get("bad") else 200)(scope, receive, send)


@asynccontextmanager
async def working(*workers: BatchWorker) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def openai_of(folder: Path, batches: BatchStore, ring: Keyring | None = None, key: str = "none") -> AsyncOpenAI:
    """OpenAI's client of a replica that has a store and cannot generate."""
    service = silent_service(folder)
    service.batches = batches
    http = web_client(create_app(service, ring))
    return AsyncOpenAI(base_url="http://api/v1", api_key=key, max_retries=0, http_client=http)


async def created(client: AsyncOpenAI, text: str, **more: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    fields = {"endpoint": CHAT, "completion_window": "24h"} | more
    return await client.batches.create(input_file_id=file.id, **fields)


async def until_ended(client: AsyncOpenAI, batch: Any) -> Any:
    """The batch when it has ended."""
    open_ones = {"validating", "in_progress", "cancelling"}
    while (found := await client.batches.retrieve(batch.id)).status in open_ones:
        await asyncio.sleep(0.01)
    return found


async def answers(client: AsyncOpenAI, file_id: str) -> dict[str, Any]:
    """The lines of a file of answers, by their ids; each is there once."""
    text = (await client.files.content(file_id)).text
    found = [json.loads(each) for each in text.splitlines()]
    by_id = {each["custom_id"]: each for each in found}
    assert len(by_id) == len(found)
    return by_id


async def test_openais_client_has_a_file_of_requests_answered(tmp_path: Path, store: Store) -> None:
    """The client uploads, creates, polls, downloads answers and refusals, lists and deletes."""
    async with open_api(openai_world(tmp_path / "world")) as api:
        batches = api.ready.service.batches = BatchStore(store)
        app, client = create_app(api.ready.service), api.openai
        async with working(BatchWorker(batches, app, None, beat_s=0.01)):
            message = {"role": "user", "content": "hello"}
            hello = {"messages": [message], "max_tokens": 3, "ignore_eos": True}
            text = (
                line("a", model="base", **hello)
                + line("b", model="wide", **hello)
                + line("c", model="no", **hello)
            )
            batch = await created(client, text, metadata={"for": "me"})
            ended = await until_ended(client, batch)
        assert (ended.status, ended.metadata, ended.errors) == ("completed", {"for": "me"}, None)
        assert ended.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
        assert ended.created_at <= ended.in_progress_at <= ended.completed_at < ended.expires_at
        good, bad = [await answers(client, each) for each in (ended.output_file_id, ended.error_file_id)]
        assert {
            each: found["response"]["body"]["usage"]["completion_tokens"] for each, found in good.items()
        } == {"a": 3, "b": 3}
        assert bad["c"]["response"]["status_code"] == 404
        assert (await client.files.content(batch.input_file_id)).text == text
        assert [each.purpose async for each in client.files.list()] == ["batch_output", "batch_output", "batch"]
        assert [each.id async for each in client.files.list(purpose="batch", limit=1)] == [batch.input_file_id]
        assert [each.id async for each in client.batches.list(limit=1)] == [batch.id]
        assert (await client.files.delete(batch.input_file_id)).deleted
        with pytest.raises(NotFoundError, match="no file 'file-") as absent:
            await client.files.retrieve(batch.input_file_id)
        assert absent.value.code == "file_not_found"


async def test_a_killed_replica_loses_no_answer_and_repeats_none(tmp_path: Path, store: Store) -> None:
    """Another one goes on when the lease of the first ended, and the output has each request once."""
    clock, first, second = [0.0], Echo(12), Echo()
    client = openai_of(tmp_path, batches := BatchStore(store))
    text = "".join(line(f"r{number}", n=f"r{number}", bad=number % 2) for number in range(40))
    killed = BatchWorker(batches, first, None, 4, beat_s=0.001, clock=time.monotonic)
    async with working(killed) as [task]:
        batch = await created(client, text)
        await until(lambda: list(store.list(f"{owner_of('')}/work/{batch.id}/parts/")), "stored answers")
        gone = Mock(spec=Store, put=Mock(side_effect=StoreUnavailable("the process was killed")))
        killed.batches = BatchStore(gone)  # nothing is tidied up
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    stored = (await client.batches.retrieve(batch.id)).request_counts
    other = BatchWorker(batches, second, None, 4, lease_s=60, beat_s=0.01, clock=lambda: clock[0])
    await other.look()
    await other.look()
    leases = f"{owner_of('')}/work/{batch.id}/leases/"
    assert len(list(store.list(leases))) == 1, "the lease may still be renewed"
    clock[0] = 61.0
    async with working(other):
        ended = await until_ended(client, batch)
        await until(lambda: not list(store.list(leases)), "the end of the work")
        assert not list(store.list("open/"))
        assert {key.split("/")[3] for key in store.list(f"{owner_of('')}/work/")} == {"began.json", "ended"}
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 20, 20)
    assert len(second.asked) == 40 - stored.completed - stored.failed
    good, bad = await answers(client, ended.output_file_id), await answers(client, ended.error_file_id)
    assert good.keys() | bad.keys() == {f"r{number}" for number in range(40)}


async def test_a_replica_that_stores_answers_and_no_end_leaves_no_second_file(tmp_path: Path) -> None:
    """The next one stores the files of answers in their place."""
    client = openai_of(tmp_path, broken := BatchStore(MemoryStore()))
    broken.end = end = Mock(side_effect=StoreUnavailable("no answer"))  # type: ignore[method-assign]
    async with working(BatchWorker(broken, Echo(), None, 1, beat_s=0.01)):
        batch = await created(client, line("r", n="r"))
        await until(lambda: end.called, "answers as files")
    async with working(BatchWorker(BatchStore(broken.store), Echo(), None, 1, beat_s=0.01)):
        ended = await until_ended(client, batch)
    assert [each.id async for each in client.files.list(purpose="batch_output")] == [ended.output_file_id]


@pytest.mark.parametrize("workers", [2, 5])
async def test_two_replicas_never_take_one_batch(workers: int) -> None:
    """However their operations on the store interleave, at most one has a lease of the highest number."""
    for _ in range(20):
        batches, now = BatchStore(MemoryStore()), int(time.time())
        batch_id, owner = records.new_id("batch_"), owner_of("")
        times = {"created_at": now, "expires_at": now + 60, "kept_s": 60}
        creation = Creation(id=batch_id, key_id="", input_file_id="", endpoint=CHAT, metadata=None, **times)
        batches.create(owner, creation)
        rivals = [BatchWorker(batches, Echo(), None) for _ in range(workers)]
        taken = await asyncio.gather(*(asyncio.to_thread(each.take, owner, batch_id) for each in rivals))
        assert sum(job is not None for job in taken) <= 1


async def test_a_cancelled_batch_keeps_what_is_answered(tmp_path: Path) -> None:
    """Requests that are open are broken off; a batch that has ended cannot be cancelled."""
    app = Echo(4)
    client = openai_of(tmp_path, batches := BatchStore(MemoryStore()))
    async with working(BatchWorker(batches, app, None, 2, beat_s=0.01)):
        batch = await created(client, "".join(line(f"r{number}", n=f"r{number}") for number in range(9)))
        await until(lambda: len(app.asked) == 6, "open requests")
        with pytest.raises(BadRequestError, match="is read by batch_"):
            await client.files.delete(batch.input_file_id)
        assert (await client.batches.cancel(batch.id)).cancelling_at
        ended = await until_ended(client, batch)
    assert (ended.status, ended.request_counts.completed, ended.error_file_id) == ("cancelled", 4, None)
    assert len(await answers(client, ended.output_file_id)) == 4
    with pytest.raises(BadRequestError, match="is cancelled: expected a batch that has not ended"):
        await client.batches.cancel(batch.id)


async def test_a_batch_expires(tmp_path: Path) -> None:
    """After its window, what is not answered is in the file of errors; the batch ends even without its key."""
    client = openai_of(tmp_path, batches := BatchStore(MemoryStore()))
    batch = await created(client, line("a", n="a") + line("b", n="b"))
    key = f"{owner_of('')}/batches/{batch.id}.json"
    batches.write(key, batches.read(key, Creation).model_copy(update={"expires_at": 1}))
    async with working(BatchWorker(batches, Echo(), Keyring(), beat_s=0.01)):
        ended = await until_ended(client, batch)
    assert (ended.status, ended.request_counts.failed, ended.output_file_id) == ("expired", 2, None)
    errors = await answers(client, ended.error_file_id)
    assert {each["error"]["code"] for each in errors.values()} == {"batch_expired"}


async def test_a_key_sees_and_spends_its_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of other keys are not found; requests of a key that is gone are not sent; bounds are of a key."""
    mine, others = new_entry("mine", "infer"), new_entry("others", "infer")
    ring, batches, app = Keyring(text=lines(mine[1], others[1])), BatchStore(MemoryStore()), Echo()
    me, other = (openai_of(tmp_path, batches, ring, key) for key, _ in (mine, others))
    monkeypatch.setattr(records, "MOST_OPEN", 1)
    batch = await created(me, line("a", n="a"))
    for hidden in (
        other.batches.retrieve(batch.id),
        other.batches.cancel(batch.id),
        other.files.content(batch.input_file_id),
        other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(NotFoundError):
            await hidden
    assert not (await other.batches.list()).data + (await other.files.list()).data
    with pytest.raises(RateLimitError, match="1 batches of this key have not ended"):
        await created(me, line("a", n="a"))
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(batches, "open", Mock(side_effect=[(), ("another", "this")]))
        with pytest.raises(RateLimitError):
            await created(other, line("b", n="b"))
    await created(other, line("b", n="b"))
    monkeypatch.setattr(records, "MOST_BYTES", 100)
    with pytest.raises(RateLimitError, match="the files of this key take"):
        await created(me, line("a", n="a"))
    async with working(BatchWorker(batches, app, Keyring(text=lines(mine[1])), beat_s=0.01)):
        assert (await until_ended(me, batch)).status == "completed"
    assert app.asked == ["a"]


async def test_one_key_does_not_hold_all_places(tmp_path: Path) -> None:
    """A key that is alone has all places but one, for batches and for uploads; the next key has the last."""
    (mine, me), (theirs, them) = new_entry("me", "infer"), new_entry("them", "infer")
    ring, batches, app = Keyring(text=lines(me, them)), BatchStore(MemoryStore()), Echo(0)
    my_api, their_api = (openai_of(tmp_path, batches, ring, key) for key in (mine, theirs))
    for _ in range(work.AT_ONCE):
        await created(my_api, line("m", n="m"))
    worker = BatchWorker(batches, app, ring, beat_s=0.01)
    async with working(worker):
        await until(lambda: len(app.asked) == work.AT_ONCE - 1, "all batches but one", lambda: app.asked)
        await created(their_api, line("t", n="t"))
        await until(lambda: "t" in app.asked, "another key's batch", lambda: app.asked)
    assert app.asked == ["m"] * (work.AT_ONCE - 1) + ["t"]
    with ExitStack() as places:
        for _ in range(records.UPLOADS - 1):
            places.enter_context(batches.uploads.held("me", "files"))
        with pytest.raises(RateLimitError, match="this key has its share of 32 places"):
            await created(my_api, line("m", n="m"))
        await created(their_api, line("t2", n="t2"))


async def test_of_two_busy_keys_each_has_half_of_the_batches(tmp_path: Path) -> None:
    """The last place is left to a key that has none, and is taken when such a key comes."""
    entries = {name: new_entry(name, "infer") for name in "abc"}
    ring = Keyring(text=lines(*(entry for _, entry in entries.values())))
    batches, app = BatchStore(MemoryStore()), Echo(0)
    apis = {name: openai_of(tmp_path, batches, ring, key) for name, (key, _) in entries.items()}
    for name in "aaaabbbb":
        await created(apis[name], line(name, n=name))
    async with working(BatchWorker(batches, app, ring, beat_s=0.01)):
        await until(lambda: len(app.asked) == 3, "all batches but one", lambda: app.asked)
        await created(apis["c"], line("c", n="c"))
        await until(lambda: "c" in app.asked, "the third key's batch", lambda: app.asked)
    assert sorted(app.asked) in (["a", "a", "b", "c"], ["a", "b", "b", "c"])


async def test_what_is_damaged_is_not_used(tmp_path: Path) -> None:
    """Damaged answers are asked for again; a damaged file ends its batch, and is not handed out."""
    batches, app = BatchStore(store := MemoryStore()), Echo(1)
    client, owner, other = openai_of(tmp_path, batches), owner_of(""), f"batch_{'0' * 32}"
    for key in (f"{owner}/batches/{other}.json", f"open/{other}/{owner}"):
        store.put(key, b"damaged, which is no other batch's matter")

    def damage(part: str) -> None:
        [key] = [key for key in store.list("") if part in key]
        store.put(key, store.get(key).replace(b'"n"', b'"m"'))

    async with working(BatchWorker(batches, app, None, 1, beat_s=60)):
        batch = await created(client, line("a", n="a") + line("b", n="b"))
        await until(lambda: len(app.asked) == 2, "an answer")
    damage("/parts/")
    async with working(BatchWorker(batches, app := Echo(), None, beat_s=0.01)):
        assert (await until_ended(client, batch)).request_counts.completed == 2
        assert sorted(app.asked) == ["a", "b"]
        assert [each.id async for each in client.batches.list()] == [batch.id]
    batch = await created(client, line("a", n="a"))
    damage(f"/pieces/{batch.input_file_id}")
    async with working(BatchWorker(batches, app, None, beat_s=0.01)):
        ended = await until_ended(client, batch)
    assert (ended.status, ended.errors.data[0].code) == ("failed", "file_unreadable")
    with pytest.raises(InternalServerError, match="is not what was stored there"):
        await client.files.content(batch.input_file_id)


@pytest.mark.parametrize(("text", "expected"), cases(__file__, "test_lines_that_are_no_requests"))
async def test_lines_that_are_no_requests_fail_the_batch(tmp_path: Path, text: str, expected: Any) -> None:
    """Errors name the line, what was expected and what was found; no request is sent."""
    client = openai_of(tmp_path, batches := BatchStore(MemoryStore()))
    async with working(BatchWorker(batches, app := Echo(), None, beat_s=0.01)):
        ended = await until_ended(client, await created(client, text))
    error = ended.errors.data[0]
    assert (ended.status, ended.failed_at is not None, app.asked) == ("failed", True, [])
    assert [error.code, error.line, error.message] == expected


def field(name: str, value: str) -> str:
    """Return a part of a form; the name may have parameters behind it."""
    return f'--B\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'


FORM = "multipart/form-data; boundary=B"
FILE, BATCH, END = field('file"; filename="a', "{}"), field("purpose", "batch"), "--B--"
UPLOADS = {
    "good": (FORM, FILE + BATCH + END, 200, '"filename":"a"'),
    "JSON": ("application/json", "{}", 415, "expected a form with content-type: multipart/form-data"),
    "no boundary": ("multipart/form-data", FILE, 415, "expected a form"),
    "no end": (FORM, FILE + BATCH, 400, "found no end"),
    "no name": (FORM, "--B\r\n\r\n\r\nx\r\n--B--", 400, "a part without a name"),
    "a name in UTF-7": (
        FORM, field("file\"; filename*=utf-7''%2B2AA-", "{}") + BATCH + END, 200, '"filename":"file"'
    ),
    "no part": (FORM, "x" * 9000, 400, "no beginning of a part"),
    "no purpose": (FORM, FILE + END, 400, "purpose: expected batch, found none"),
    "a purpose": (FORM, FILE + field("purpose", "assistants") + END, 400, "expected batch, found assistants"),
    "no file": (FORM, BATCH + END, 400, "file: expected a file, found none"),
    "a field": (FORM, FILE + field("color", "red") + END, 400, "color: expected file, purpose"),
    "expiry": (FORM, FILE + BATCH + field("expires_after[anchor]", "created_at") + END, 400, "3600 to 2592000"),
    "long": (FORM, FILE + field("purpose", "x" * 2000) + END, 400, "at most 1000 characters"),
}  # fmt: skip


@pytest.mark.parametrize("name", UPLOADS)
async def test_uploads_are_forms(tmp_path: Path, name: str) -> None:
    """A file is a form, in whatever pieces it arrives; nothing of a refused form is stored."""
    content_type, body, status, message = UPLOADS[name]
    service = silent_service(tmp_path)
    service.batches = BatchStore(store := MemoryStore())

    async def bytewise() -> AsyncIterator[bytes]:
        for place in range(len(body)):
            yield body[place : place + 1].encode()

    async with web_client(create_app(service)) as http:
        for content in (body.encode(), bytewise()):
            answer = await http.post("/v1/files", content=content, headers={"content-type": content_type})
            assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert bool(list(store.list(""))) is (status == 200)


FILE_PART = b'--B\r\ncontent-disposition: form-data; name="file"\r\n\r\n{}\r\n'


@pytest.mark.parametrize(
    ("first", "again", "found"),
    [
        (b"", FILE_PART * 100, "more than 16 parts"),
        (b"", b"--B\r\n\r\n\r\n" * 100, "a part without a name"),
        (b"\r\n", b"\r\n" * 1000, "more than 65536 bytes beside the file"),
        (FILE_PART + b"--B--", b"x" * 1000, "more than 65536 bytes beside the file"),
        (b"--B\r\n", b"x-a: b\r\n" * 100, "no beginning of a part"),
    ],
    ids=["parts", "nameless parts", "preamble", "epilogue", "headers"],
)
async def test_a_form_without_end_is_refused_early(
    tmp_path: Path, first: bytes, again: bytes, found: str
) -> None:
    """Whatever it repeats: parts, headers, or bytes around them."""
    service, chunks = silent_service(tmp_path), count()
    service.batches = BatchStore(store := MemoryStore())

    async def endless() -> AsyncIterator[bytes]:
        yield first
        while next(chunks) < 1000:
            yield again

    async with web_client(create_app(service)) as http:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        answer = await http.post("/v1/files", content=endless(), headers=headers)
    assert (answer.status_code, found in answer.text, next(chunks) < 100) == (400, True, True), answer.text
    assert not list(store.list(""))


async def test_what_expired_is_removed(tmp_path: Path) -> None:
    """A sweep removes expired files, pieces of broken uploads and old batches, and nothing else."""
    client = openai_of(tmp_path, batches := BatchStore(store := MemoryStore()))
    batch = await created(client, line("a"))
    owner, before = owner_of(""), set(store.list(""))
    old = new_file("old", "batch", 0)
    records.Pieces(batches, owner, old.id).close(old)
    for key in ("{1}/work/{0}/ended/000001", "{1}/batches/{0}.json", "open/{0}/{1}"):
        store.put(key.format(f"batch_{'0' * 32}", owner), b"damaged")
    batches.sweep()
    assert set(store.list("")) == before
    with pytest.raises(NotFoundError):
        await client.files.retrieve(old.id)
    assert (await client.batches.retrieve(batch.id)).status == "validating"


async def test_without_a_store_there_are_none(tmp_path: Path) -> None:
    """The refusal says how to have files and batches."""
    with pytest.raises(NotFoundError, match="Start it with LORAMUX_BATCH_STORE"):
        await openai_of(tmp_path, None).batches.list()


def short_leases(most: float) -> None:
    """Let a process believe sooner that another one was killed, and answer so many requests at most."""
    sent = count()

    def worker(batches: BatchStore, app: Any, *rest: Any) -> BatchWorker:
        async def some(*call: Any) -> None:
            await (app(*call) if next(sent) < most else asyncio.Event().wait())

        return BatchWorker(batches, some, *rest, lease_s=0.3, beat_s=0.05)

    work.BatchWorker = worker  # type: ignore[misc,assignment]


@pytest.mark.parametrize("api_processes", ["0", "1"])
async def test_a_process_is_killed_in_the_middle(tmp_path: Path, api_processes: str) -> None:
    """Successors end the batch, after a kill and after SIGTERM: each request has one answer."""
    world = make_world(tmp_path)
    world.build(open_store(f"file://{tmp_path}/store"))
    settings = {"LORAMUX_BATCH_STORE": f"file://{tmp_path}/batches", "LORAMUX_API_PROCESSES": api_processes}
    number, text = 0, ""
    for number in range(300):
        body = {"model": "base", "prompt": [5, 6, number % 7 + 3], "max_tokens": 100, "ignore_eos": True}
        text += line(f"r{number}", **body).replace(CHAT, "/v1/completions")
    batch, before = None, 0
    beside = openai_of(tmp_path, BatchStore(open_store(settings["LORAMUX_BATCH_STORE"])))
    for end, most in ((Forked.kill, 100), (Forked.terminate, 100), (None, math.inf)):
        with run_inference(world, tmp_path, partial(short_leases, most), **settings) as (process, ready):
            async with AsyncOpenAI(
                base_url=f"http://{ready['http']}/v1", api_key="none", timeout=BOUND_S
            ) as client:
                batch = batch or await created(client, text, endpoint="/v1/completions")
                if end is None:
                    ended = await until_ended(client, batch)
                    break
                while (found := await client.batches.retrieve(batch.id)).request_counts.completed <= before:
                    await asyncio.sleep(0.01)
                assert found.status == "in_progress"
            end(process)
            process.wait()
        before = (await beside.batches.retrieve(batch.id)).request_counts.completed
    assert (ended.status, ended.request_counts.completed) == ("completed", 300)
    assert len(await answers(beside, ended.output_file_id)) == 300
