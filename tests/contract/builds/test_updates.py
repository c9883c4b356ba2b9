"""Deployments that change adapter by adapter, over gRPC: updates, pushes, rollbacks, and their history."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from builder_service.builds import pushes, shown
from builder_service.builds.pushes import PushedChunk, Upload
from builder_service.pipeline.build import build
from builder_service.pipeline.context import Ledger
from builder_service.pipeline.progress import Progress
from builder_service.pipeline.update import Update, update
from loramux.builder.v1 import builder_pb2 as pb, builder_pb2_grpc
from loramux.client import AsyncClient
from loramux.records import DeploymentInfo, DeploymentState
from loramux_shared import faults
from loramux_shared.access.keys import ACCESS, Access, Scope
from loramux_shared.bundle.deployments import publish_change
from loramux_shared.bundle.generation import Generation, generation_key
from loramux_shared.bundle.manifest import WEIGHTS_FILE, bundle_key
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.deployment import Deployment, Repository, Runtime, SourceKind
from loramux_shared.rpc.calls import Patience
from loramux_shared.rpc.status import fault_of
from tests.golden.wild.shape import Shape
from tests.support.builders import HOUR, Builders, GatedStore
from tests.support.root import ROOT
from tests.support.waiting import BOUND_S, Clock, result_of, until


class World(Builders):
    """A served builder, and its client."""

    client: AsyncClient
    channel: grpc.aio.Channel

    async def build(self, deployment: Deployment, *, exact: bool = False) -> DeploymentInfo:
        await self.client.build(deployment, exact=exact)
        return await self.ended()

    async def update(self, *names: str, remove: Iterable[str] = (), **fields: Any) -> DeploymentInfo:
        await self.client.update("tiny", {name: self.repository(name) for name in names}, remove, **fields)
        return await self.ended()

    async def ended(self) -> DeploymentInfo:
        """Return the last state of the deployment; raises the failure of a build."""
        *_, last = [info async for info in self.client.watch("tiny")]
        if last.state is DeploymentState.FAILED and last.failure:
            raise last.failure
        return last

    @property
    def uploads(self) -> list[Path]:
        """The folders of builds that have not ended."""
        return list((self.folder / "work").glob("loramux-build-*"))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A world with a deployment of one adapter, which is generation 1."""
    made = World(tmp_path)
    patience = Patience(send_s=1e9, pause_s=HOUR)
    async with (
        made.served(made.builder(), patience) as address,
        AsyncClient(builder=address) as made.client,
        grpc.aio.insecure_channel(address) as made.channel,
    ):
        await made.build(made.deployment("one"))
        yield made


async def test_an_update_adds_and_removes(world: World) -> None:
    """The next generation adds and removes adapters, and keeps the rest."""
    one = world.generation.adapters["one"]
    done = await world.update("two")
    assert (done.state, done.generation, [each.name for each in done.adapters]) == ("active", 2, ["two"])
    assert world.generation.adapters["one"] == one
    assert [each.name for each in (await world.client.deployment("tiny")).adapters] == ["one", "two"]
    done = await world.update("three", remove=["one"])
    assert (done.generation, list(world.generation.adapters)) == (3, ["three", "two"])
    assert world.generation.recipe is not None


async def test_a_file_that_is_built_again_leaves_what_was_added(world: World) -> None:
    """Pushed and added adapters stay, by name, whatever their sources have become; with exact they leave."""
    await world.client.push("tiny", "two", world.folder / "two")
    await world.update("three")
    before = world.generation
    shutil.rmtree(world.folder / "three")
    done = await world.build(world.deployment("one"))
    assert (done.unchanged, world.generation) == (True, before)
    assert [(each.name, each.added, each.kept) for each in done.adapters] == [
        ("one", False, True),
        ("three", True, True),
        ("two", True, True),
    ]
    await world.build(world.deployment("one", max_seq_len=100))
    assert list(world.generation.adapters) == ["one", "three", "two"]
    done = await world.build(world.deployment("one"), exact=True)
    assert list(world.generation.adapters) == [each.name for each in done.adapters] == ["one"]


async def test_what_stays_is_made_again_for_other_settings(world: World) -> None:
    """An adapter with a source is made again; a pushed one has none, and the build is refused."""
    await world.update("two")
    wide = world.deployment("one", lora_configuration={"dtype": "float32"})
    done = await world.build(wide)
    assert (done.generation, world.generation.adapters["two"].added) == (3, True)
    assert read_manifest(world.store, world.generation.adapters["two"].digest).dtype == "float32"
    await world.client.push("tiny", "three", world.folder / "three")
    ceiling = {"lora_configuration": {"dtype": "float32", "max_lora_rank": 32}}
    done = await world.build(world.deployment("one", **ceiling))
    assert [each.name for each in done.adapters if each.added and each.kept] == ["three", "two"]
    low = world.deployment(lora_configuration={"dtype": "float32", "max_lora_rank": 1})
    with pytest.raises(faults.DeploymentInvalid, match="no files to make three"):
        await world.build(low)
    with pytest.raises(faults.DeploymentInvalid, match=r"no files to make three for another.*--exact"):
        await world.build(world.deployment("one"))
    wide = wide.model_copy(update={"runtime": Runtime(served_model_name="Two")})
    with pytest.raises(faults.DeploymentInvalid, match=r"names conflict.*does not name three, two"):
        await world.build(wide)
    assert list(world.generation.adapters) == ["one", "three", "two"]


async def test_a_file_takes_a_name_that_was_pushed(world: World) -> None:
    """The file's adapter is served under the name, with a warning that tells of the other."""
    pushed = await world.client.push("tiny", "three", world.folder / "two")
    done = await world.build(world.deployment("one", "three"))
    [warning] = [each for each in done.adapters[1].warnings if each.code == "W_REPLACED"]
    assert f"PUSHED three, digest {pushed.digest[:12]}" in warning.found
    three = world.generation.adapters["three"]
    assert (three.added, three.digest != pushed.digest) == (False, True)
    done = await world.build(world.deployment("one", "three"))
    assert "W_REPLACED" not in {each.code for each in done.adapters[1].warnings}


class Overtaken(GatedStore):
    """Another builder publishes generation 3 in the moment in which generation 2 is there."""

    def put(self, key: str, data: bytes | Path) -> None:
        super().put(key, data)
        if key == generation_key("tiny", 2) and isinstance(data, bytes):
            change = {"number": 3, "request_default_max_tokens": 7}
            other = Generation.from_bytes(data, what=key).model_copy(update=change)
            super().put(generation_key("tiny", 3), other.to_bytes())


def test_an_adapter_that_must_be_new_may_be_there_already(tmp_path: Path) -> None:
    """An update with must_be_new is done though another builder publishes behind it at once."""
    made = Builders(tmp_path)
    made.store = Overtaken()
    context = made.context()
    build(made.deployment("one"), context, Progress(["one"]))
    wish = Update(name="tiny", add={"two": made.repository("two")}, must_be_new=True)
    assert update(wish, context, Progress(["two"])).generation.number == 2
    assert (list(made.generation.adapters), made.generation.adapters["two"].added) == (["one", "two"], True)
    with pytest.raises(faults.AdapterExists):
        update(wish, context, Progress(["two"]))


async def test_a_push_during_a_build_stays(world: World) -> None:
    """An adapter that comes in while a file is built is in the generation that the build publishes."""
    world.store.gate.clear()
    await world.client.build(world.deployment("one", "three"))
    await until(world.store.waiting.is_set, "the adapter at the gate")
    change = {
        "adapters": {
            **world.generation.adapters,
            "two": world.generation.adapters["one"].model_copy(update={"added": True}),
        }
    }
    added = Generation.model_validate(world.generation.model_copy(update=change).model_dump())
    await asyncio.to_thread(publish_change, world.store, "tiny", lambda _: added)
    world.store.gate.set()
    await world.ended()
    assert list(world.generation.adapters) == ["one", "three", "two"]


async def test_what_an_update_is_refused_for(world: World) -> None:
    """Names, numbers and adapters that do not fit are named before anything is published."""
    with pytest.raises(faults.AdapterNotFound, match="no adapter nine; it has one"):
        await world.update(remove=["nine"])
    with pytest.raises(faults.DeploymentNotFound, match="tiny"):
        await world.client.update("other", {"two": world.repository("two")})
    with pytest.raises(faults.GenerationMismatch, match="expected generation 7, found 1"):
        await world.update("two", expected_generation=7)
    with pytest.raises(faults.DeploymentInvalid, match="names conflict"):
        await world.client.update("tiny", {"ONE": world.repository("two")})
    with pytest.raises(faults.DeploymentInvalid):
        await world.client.update("tiny")
    with pytest.raises(faults.DeploymentInvalid):
        await world.client.update("tiny", {"two": world.repository("two")}, ["two"])
    with pytest.raises(faults.AdapterInvalid, match="E_DORA"):
        await world.update("bad")
    with pytest.raises(faults.RepoNotFound):
        await world.update("missing")
    assert world.generation.number == 1


async def test_aliases_are_names_too(world: World) -> None:
    """A generation has no alias with the name of a model, and none without a served model."""
    await world.update("two")
    deployment = world.deployment("one")
    runtime = deployment.runtime.model_copy(update={"aliases": {"al": {"one": 1}}})
    await world.build(deployment.model_copy(update={"runtime": runtime}), exact=True)
    assert world.generation.number == 3
    with pytest.raises(faults.DeploymentInvalid, match="found alias al"):
        await world.client.update("tiny", {"AL": world.repository("two")})
    with pytest.raises(faults.DeploymentInvalid, match="found alias al"):
        await world.client.push("tiny", "AL", world.folder / "two")
    with pytest.raises(faults.DeploymentInvalid, match=r"aliases.al: expected a served model .*found one: 1"):
        await world.client.update("tiny", remove=["one"])
    renamed = world.generation.model_copy(update={"adapters": {"AL": world.generation.adapters["one"]}})
    world.store.put(generation_key("tiny", 2), renamed.model_copy(update={"number": 2}).to_bytes())
    with pytest.raises(faults.DeploymentInvalid, match="alias al"):
        await world.client.rollback("tiny", 2)
    assert world.generation.number == 3


async def test_an_update_is_made_again_when_the_settings_changed_meanwhile(world: World) -> None:
    """Another builder publishes other settings while an adapter is made: it is made again for those."""
    world.store.gate.clear()
    await world.client.update("tiny", {"two": world.repository("two")})
    await until(world.store.waiting.is_set, "the adapter at the gate")
    change = {"lora_dtype": "float32", "max_lora_rank": 32}
    other = Generation.model_validate(world.generation.model_dump() | change)
    await asyncio.to_thread(publish_change, world.store, "tiny", lambda _: other)
    world.store.gate.set()
    done = await world.ended()
    assert (done.generation, world.generation.max_lora_rank) == (3, 32)
    assert list(world.generation.adapters) == ["one", "two"]
    assert read_manifest(world.store, world.generation.adapters["two"].digest).dtype == "float32"


async def test_a_pushed_adapter_is_what_its_folder_would_be(world: World) -> None:
    """Same digest as the folder's; pushing it again changes nothing; an update keeps it."""
    pushed = await world.client.push("tiny", "two", world.folder / "two")
    assert (pushed.generation, pushed.unchanged) == (2, False)
    assert world.generation.adapters["two"].digest == pushed.digest
    again = await world.client.push("tiny", "two", world.folder / "two")
    assert (again.generation, again.unchanged, again.digest) == (2, True, pushed.digest)
    await world.update("three")
    assert world.generation.adapters["two"].digest == pushed.digest
    done = await world.update("two")  # now from its folder
    assert (done.generation, world.generation.adapters["two"].digest) == (4, pushed.digest)


async def test_a_push_says_what_the_folder_has_instead_of_weights(world: World) -> None:
    """A pickle is never sent, and a file of several that is missing has its name; as in a build."""
    shapes = (
        ("E_BIN_ONLY", Shape("", "", "", tensors=None, files=("adapter_model.bin",))),
        ("E_SHARDED", Shape("", "", "", shards=2)),
        (
            "E_NO_CONFIG.*'last': set subfolder, or name",
            Shape("", "", "", None, None, files=("last/adapter_config.json",)),
        ),
    )
    for at, (stated, shape) in enumerate(shapes):
        folder = shape.write(world.folder / f"shape-{at}")
        for path in folder.glob("adapter_model-00002-*"):
            path.unlink()
        with pytest.raises(faults.AdapterInvalid, match=stated):
            await world.client.push("tiny", "shape", folder)


async def test_a_file_of_llama_cpp_is_pushed_with_its_folder(world: World) -> None:
    """The one file of GGUF in a folder is sent; a name that leads elsewhere is refused."""
    name = "llama-cpp-lora.gguf"
    content = (ROOT / "tests/golden/formats" / name).read_bytes()
    (world.folder / "lora").mkdir()
    (world.folder / "lora" / name).write_bytes(content)
    pushed = await world.client.push("tiny", "lora", world.folder / "lora")
    assert pushed.adapter.kinds == ("lora", "embedding")
    with pytest.raises(faults.RequestInvalid, match=r"NAME\.gguf"):
        await world.client.push("tiny", "lora", {"../a.gguf": content})


async def test_a_build_keeps_a_pushed_adapter_that_its_file_names(world: World) -> None:
    """source: PUSHED means the adapter that was pushed under that name; a file may rename it."""
    pushed = await world.client.push("tiny", "two", world.folder / "two")
    named = world.deployment("one")
    adapters = {**named.build.lora_adapters, "2": Repository(source=SourceKind.PUSHED, repo="two")}
    build = named.build.model_copy(update={"lora_adapters": adapters})
    await world.build(named.model_copy(update={"build": build}))
    assert world.generation.adapters["2"].digest == pushed.digest
    assert list(world.generation.adapters) == ["2", "one", "two"]
    await world.build(world.deployment("one"), exact=True)
    assert list(world.generation.adapters) == ["one"]
    with pytest.raises(faults.RepoNotFound, match="Push it again"):
        await world.build(named.model_copy(update={"build": build}))


async def test_what_a_push_is_refused_for(world: World) -> None:
    """Rules, names and expectations hold as they do for repositories."""
    with pytest.raises(faults.AdapterInvalid, match="E_DORA"):
        await world.client.push("tiny", "bad", world.folder / "bad")
    with pytest.raises(faults.DeploymentInvalid, match="names conflict"):
        await world.client.push("tiny", "TINY", world.folder / "two")
    with pytest.raises(faults.GenerationMismatch):
        await world.client.push("tiny", "two", world.folder / "two", expected_generation=9)
    with pytest.raises(faults.DeploymentNotFound):
        await world.client.push("other", "two", world.folder / "two")
    assert world.generation.number == 1
    assert world.uploads == []


async def parts(*messages: pb.PutAdapterRequest) -> AsyncIterator[pb.PutAdapterRequest]:
    """Return the messages of an upload, as a client written from the protos would send them."""
    for message in messages:
        yield message


UPLOAD = pb.PutAdapterRequest(upload=pb.AdapterUpload(deployment="tiny", name="two", config=b"{}"))
NAMED = pb.PutAdapterRequest(
    upload=pb.AdapterUpload(
        deployment="tiny", name="two", config=b"{}", other_files=["adapter_model.safetensors"]
    )
)


def chunk(file: str, data: bytes = b"x") -> pb.PutAdapterRequest:
    return pb.PutAdapterRequest(chunk=pb.FileChunk(file=file, data=data))


NO_UPLOADS: dict[str, tuple[tuple[pb.PutAdapterRequest, ...], type[Exception]]] = {
    "a chunk first": ((chunk(""),), faults.RequestInvalid),
    "nothing": ((), faults.RequestInvalid),
    "two uploads": ((UPLOAD, UPLOAD), faults.RequestInvalid),
    "an empty message": ((UPLOAD, pb.PutAdapterRequest()), faults.RequestInvalid),
    "a pickle": ((UPLOAD, chunk("adapter_model.bin")), faults.RequestInvalid),
    "a path": ((UPLOAD, chunk("../../etc/passwd")), faults.RequestInvalid),
    "weights by their name alone": ((NAMED,), faults.RequestInvalid),
    "no safetensors": ((UPLOAD, chunk("")), faults.AdapterInvalid),
}


async def test_what_an_upload_may_not_be(world: World) -> None:
    """A client that sends something else, or nothing more, gets the reason, and nothing is left of it."""
    stub = builder_pb2_grpc.BuilderServiceStub(world.channel)
    for name, (messages, reason) in NO_UPLOADS.items():
        with pytest.raises(grpc.RpcError) as error:
            await stub.PutAdapter(parts(*messages))
        assert isinstance(fault_of(error.value), reason), name
        assert world.generation.number == 1
        await until(lambda: world.uploads == [], "the end of the upload")


@pytest.mark.parametrize(
    ("upload_s", "why"), [(600.0, "took longer than 600 s"), (1e9, "nothing more of the request within 3600 s")]
)
async def test_an_upload_that_stalls_is_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, upload_s: float, why: str
) -> None:
    """A client that pauses, or sends for too long, is CLIENT_STALLED, and nothing is left of its upload."""
    monkeypatch.setattr(pushes, "MAX_UPLOAD_S", upload_s)
    clock = Clock()

    async def stalling() -> AsyncIterator[pb.PutAdapterRequest]:
        yield UPLOAD
        yield chunk("")
        await asyncio.Event().wait()

    call = builder_pb2_grpc.BuilderServiceStub(world.channel).PutAdapter(stalling())
    await until(lambda: world.uploads, "the upload at the builder")
    await until(lambda: clock.advance(HOUR) or call.done(), "the call to end")
    with pytest.raises(grpc.RpcError) as error:
        await call
    fault = fault_of(error.value)
    assert isinstance(fault, faults.ClientStalled)
    assert why in fault.message
    await until(lambda: world.uploads == [], "the end of the upload")


class HeldLock:
    """A lock that a thread waits for until a test opens it."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self.asked.set()
        assert self.open.wait(BOUND_S)

    def __exit__(self, *_: object) -> None:
        pass


async def published(_deployment: str) -> None:
    """Take note of a generation."""


async def uploaded(*sent: Upload | PushedChunk) -> AsyncIterator[Upload | PushedChunk]:
    """Return the parts of an upload that goes on."""
    for part in sent:
        yield part
    await asyncio.Event().wait()


async def test_an_upload_that_is_cut_off_leaves_nothing(world: World) -> None:
    """A write that runs when a client goes away, however often, ends before its folder is removed."""
    lock: Any = HeldLock()
    context = replace(world.context(), _ledger=Ledger(lock=lock))
    upload = asyncio.create_task(pushes.Pushes(context, published).put(uploaded(Upload("tiny", "two", b"{}"))))
    await until(lock.asked.is_set, "the write of the config")
    for _ in range(2):
        upload.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not upload.done()
    lock.open.set()
    with pytest.raises(asyncio.CancelledError):
        await result_of(upload, "the end of the upload")
    assert world.uploads == []


async def test_an_upload_begins_in_time(world: World) -> None:
    """A client that sends no first message is CLIENT_STALLED, and takes no place of another."""
    clock, places = Clock(), pushes.Pushes(world.context(), published)
    silent = [asyncio.create_task(places.put(uploaded())) for _ in range(pushes.MAX_OPEN_UPLOADS)]
    await asyncio.sleep(0)
    wrong = places.put(uploaded(PushedChunk("", b"x")))
    with pytest.raises(faults.RequestInvalid, match="first message"):
        await result_of(wrong, "the refusal of a wrong message")
    clock.advance(pushes.MAX_UPLOAD_S)
    waited = asyncio.gather(*silent, return_exceptions=True)
    for each in await result_of(waited, "the end of silent uploads"):
        assert isinstance(each, faults.ClientStalled)


async def test_uploads_that_begin_together_are_bounded(world: World) -> None:
    """The bound of open uploads holds for those whose first messages come at the same time."""
    places, together = pushes.Pushes(world.context(), published), asyncio.Event()

    async def late() -> AsyncIterator[Upload | PushedChunk]:
        await together.wait()
        async for part in uploaded(Upload("tiny", "two", b"{}")):
            yield part

    begun = [asyncio.create_task(places.put(late())) for _ in range(pushes.MAX_OPEN_UPLOADS + 3)]
    await asyncio.sleep(0)
    together.set()
    await until(lambda: sum(each.done() for each in begun) == 3, "three refusals")
    for each in begun:
        if each.done():
            assert isinstance(each.exception(), faults.QueueFull)
        each.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
    assert world.uploads == []


async def test_a_key_that_pushes_much_leaves_room_for_another(world: World) -> None:
    """The key with open uploads is told of its share, and the first upload of another key begins."""
    places = pushes.Pushes(world.context(), published)

    def push(key_id: str) -> asyncio.Task[pushes.Pushed]:
        ACCESS.set(Access(key_id, frozenset({Scope.BUILD})))
        return asyncio.create_task(places.put(uploaded(Upload("tiny", "two", b"{}"))))

    async def push_much() -> list[asyncio.Task[pushes.Pushed]]:
        return [push("busy") for _ in range(pushes.MAX_OPEN_UPLOADS)] + [push("other")]

    *busy, over, other = await asyncio.create_task(push_much())
    with pytest.raises(faults.QueueFull, match=f"this key has its share of {pushes.MAX_OPEN_UPLOADS} places"):
        await result_of(over, "the refusal")
    await until(lambda: len(world.uploads) == pushes.MAX_OPEN_UPLOADS, "the uploads that began")
    for each in (*busy, other):
        assert not each.done()
        each.cancel()
    await asyncio.gather(*busy, other, return_exceptions=True)


async def test_a_rollback_serves_what_was_served(world: World) -> None:
    """The content of an older generation under a new number; without a number, of the one before."""
    first = world.generation
    await world.update("two", remove=["one"])
    back = await world.client.rollback("tiny")
    assert (back.generation, back.unchanged, back.restored) == (3, False, 1)
    assert world.generation.same_content(first)
    again = await world.client.rollback("tiny", to=1)
    assert (again.generation, again.unchanged, again.restored) == (3, True, 1)
    assert (await world.client.rollback("tiny")).generation == 4
    assert list(world.generation.adapters) == ["two"]


async def test_what_a_rollback_is_refused_for(world: World) -> None:
    """A rollback to a missing generation, after a newer one or to lost bundles is refused."""
    with pytest.raises(faults.GenerationNotFound, match="no generation before the newest; it has 1"):
        await world.client.rollback("tiny")
    with pytest.raises(faults.GenerationNotFound, match="no generation 5; it has 1"):
        await world.client.rollback("tiny", to=5)
    with pytest.raises(faults.DeploymentNotFound):
        await world.client.rollback("other")
    one = world.generation.adapters["one"].digest
    await world.update("two", remove=["one"])
    with pytest.raises(faults.GenerationMismatch):
        await world.client.rollback("tiny", to=1, expected_generation=1)
    world.store.delete(bundle_key(one, WEIGHTS_FILE))
    with pytest.raises(faults.BundleCorrupt):
        await world.client.rollback("tiny", to=1)
    assert world.generation.number == 2


async def test_the_history_tells_what_changed(world: World) -> None:
    """Newest first, page by page, each against the one before it."""
    await world.update("two")
    await world.update("three", remove=["one"])
    await world.build(world.deployment("one", lora_configuration={"max_lora_rank": 32}), exact=True)
    found = await world.client.history("tiny")
    assert [each.number for each in found] == [4, 3, 2, 1]
    assert [each.served for each in found] == [True, False, False, False]
    assert [[(c.name, c.kind) for c in each.changes] for each in found[1:]] == [
        [("one", "removed"), ("three", "added")],
        [("two", "added")],
        [("one", "added")],
    ]
    assert [each.other_settings for each in found] == [True, False, False, False]
    assert [each.adapters for each in found] == [1, 2, 2, 1]
    stub = builder_pb2_grpc.BuilderServiceStub(world.channel)
    answer = await stub.ListGenerations(pb.ListGenerationsRequest(name="tiny", page_size=3))
    assert [each.number for each in answer.generations] == [4, 3, 2]
    request = pb.ListGenerationsRequest(name="tiny", page_token=answer.next_page_token)
    assert [each.number for each in (await stub.ListGenerations(request)).generations] == [1]
    with pytest.raises(faults.DeploymentNotFound):
        await world.client.history("other")


async def test_a_follower_hears_of_every_generation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that stays open reports updates, rollbacks, and generations of another builder."""
    monkeypatch.setattr(shown, "POLL_S", 0.01)
    received: list[int] = []
    seen: list[tuple[str, int]] = []

    async def listen() -> None:
        async for info in world.client.watch("tiny", follow=True):
            seen.append((str(info.state), info.generation or 0))
            if info.state is DeploymentState.ACTIVE and info.generation not in received:
                received.append(info.generation or 0)

    async def elsewhere(**change: Any) -> None:
        other = partial(publish_change, world.store, "tiny", lambda before: before.model_copy(update=change))
        await asyncio.to_thread(other)

    listening = asyncio.create_task(listen())
    try:
        for number, publish in enumerate(
            (
                lambda: asyncio.sleep(0),
                lambda: world.update("two"),
                lambda: world.client.rollback("tiny"),
                lambda: elsewhere(max_lora_rank=16),
            ),
            1,
        ):
            await publish()
            await until(lambda number=number: number in received, f"generation {number}", lambda: seen)
        world.store.gate.clear()
        await world.client.update("tiny", {"three": world.repository("three")})
        await elsewhere(max_lora_rank=64)
        await until(lambda: seen[-1] == ("building", 5), "a generation while the update runs", lambda: seen)
        world.store.gate.set()
        await until(lambda: 6 in received, "generation 6", lambda: seen)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    assert received == [1, 2, 3, 4, 5, 6]
