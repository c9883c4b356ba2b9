"""Adapters that clients push: received into the work folder, made and published while the client waits."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, TypeVar

from builder_service.pipeline.build import BuildResult
from builder_service.pipeline.context import BuildContext
from builder_service.pipeline.making import open_workshop
from builder_service.pipeline.progress import AdapterProgress, Progress
from builder_service.pipeline.push import PushedAdapter
from builder_service.pipeline.update import changed, push
from loramux_shared.access.keys import ACCESS
from loramux_shared.access.shares import Shares
from loramux_shared.adapter_files import CONFIG, WEIGHTS
from loramux_shared.bundle.deployments import newest_generation, require
from loramux_shared.bundle.generation import AdapterRecord
from loramux_shared.bundle.names import bad_name
from loramux_shared.faults import (
    BuildInterrupted,
    ClientStalled,
    DeploymentInvalid,
    RequestInvalid,
    ResourcesExhausted,
    ShuttingDown,
)
from loramux_shared.rpc.stopping import shielded
from loramux_shared.storage.patient import PatientStore

T = TypeVar("T")

MAX_RUNNING_PUSHES: Final = 4
"""Pushed adapters that are made at once; others wait."""
MAX_OPEN_UPLOADS: Final = 64
"""Uploads that are open at once, which keys share."""
MAX_UPLOAD_S: Final = 600.0
"""Time of a whole upload."""


@dataclass(frozen=True)
class Upload:
    """The announcement of an adapter's files."""

    deployment: str
    name: str
    config: bytes = b""
    expected_generation: int | None = None
    other_files: tuple[str, ...] = ()
    """Names of files of its folder that are not sent."""


@dataclass(frozen=True)
class PushedChunk:
    """A piece of a file; of the weights where it has no name."""

    file: str
    data: bytes


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    result: BuildResult
    record: AdapterRecord
    adapter: AdapterProgress


class Pushes:
    """Takes pushed adapters. Lives on the event loop; everything that blocks runs in threads."""

    def __init__(self, context: BuildContext, published: Callable[[str], Awaitable[None]]) -> None:
        """Call published for each deployment with a new generation."""
        self._context = context
        self._published = published
        self._pool = ThreadPoolExecutor(MAX_RUNNING_PUSHES, "push")
        self._places = Shares(MAX_OPEN_UPLOADS)
        self._open: set[Progress] = set()
        self._stopped = False

    async def put(self, parts: AsyncIterator[Upload | PushedChunk]) -> Pushed:
        """Receive an adapter and publish it in the next generation of its deployment.

        Raises:
            RequestInvalid: the first part is no upload, another one is, or a chunk is of no file.
            DeploymentInvalid, DeploymentNotFound, GenerationMismatch, AdapterInvalid, QueueFull, ShuttingDown,
            StoreUnavailable
            ClientStalled: the upload took too long.
            ResourcesExhausted: the disk is full.
            SettingsInvalid: the deployment wants proofs, and this builder has no torch.
            CheckpointInvalid: the base is not served by this release.
            RepoNotFound, RevisionNotFound, RepoGated, SourceRefused, SourceChanged, SourceUnavailable,
            BundleCorrupt: what the base's source raises, whose config is read once.
            RecordTooLarge: an object of the store exceeds its bound.
            SignatureInvalid: the newest generation has no signature of a signer that this builder trusts.
        """
        async with _in_time():
            upload = await anext(parts, None)
        if self._stopped:
            raise ShuttingDown("the builder is shutting down. Retry with its successor.")
        with self._places.held(ACCESS.get().key_id, "adapters that are being pushed"):
            return await self._take(upload, parts)

    async def _take(
        self, upload: Upload | PushedChunk | None, parts: AsyncIterator[Upload | PushedChunk]
    ) -> Pushed:
        if not isinstance(upload, Upload):
            raise RequestInvalid("the first message of PutAdapter: expected an upload, found something else.")
        if finding := bad_name(upload.name, "name"):
            raise DeploymentInvalid("the adapter's name is not valid", [finding])
        progress = Progress([upload.name])
        self._open.add(progress)
        try:
            return await self._put(upload, parts, progress)
        except BuildInterrupted as fault:
            raise ShuttingDown("the builder stopped during the push. Retry with its successor.") from fault
        except OSError as error:
            problem = error.strerror or type(error).__name__
            raise ResourcesExhausted(f"the builder's work folder: {problem}. Free some space.") from error
        finally:
            progress.stop()
            self._open.discard(progress)

    def stop(self) -> None:
        """Take no new pushes, and end those that run."""
        self._stopped = True
        for progress in self._open:
            progress.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _put(
        self, upload: Upload, parts: AsyncIterator[Upload | PushedChunk], progress: Progress
    ) -> Pushed:
        await asyncio.to_thread(self._look, upload)
        store = PatientStore(self._context.store, progress.check)
        with open_workshop(self._context, store, progress) as workshop:
            adapter = PushedAdapter(
                upload.deployment,
                upload.name,
                workshop.work / "adapter-0",
                workshop.space,
                others=upload.other_files,
            )
            async with _in_time():
                await _receive(adapter, upload, parts, progress)
            future = self._pool.submit(push, adapter, workshop, upload.expected_generation)
            result, record = await _until_done(asyncio.wrap_future(future), progress)
        if not result.unchanged:
            await self._published(upload.deployment)
        return Pushed(result, record, progress.adapters[0])

    def _look(self, upload: Upload) -> None:
        """Refuse what can be refused before anything is sent."""
        before = newest_generation(self._context.store, upload.deployment)
        require(before, upload.expected_generation)
        changed(before, {upload.name: None}, ()).check_names()


async def _receive(
    adapter: PushedAdapter, upload: Upload, parts: AsyncIterator[Upload | PushedChunk], progress: Progress
) -> None:
    if upload.config:
        await _until_done(asyncio.to_thread(adapter.write, CONFIG, upload.config), progress)
    async for part in parts:
        if isinstance(part, Upload):
            raise RequestInvalid("PutAdapter: expected chunks after the first message, found another upload.")
        progress.advance(adapter.name, len(part.data))
        await _until_done(asyncio.to_thread(adapter.write, part.file or WEIGHTS, part.data), progress)


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """Bound the time of what a client sends."""
    try:
        async with asyncio.timeout(MAX_UPLOAD_S):
            yield
    except TimeoutError:
        raise ClientStalled(f"the upload took longer than {MAX_UPLOAD_S:g} s.") from None


async def _until_done(work: Awaitable[T], progress: Progress) -> T:
    """Wait for a thread; after a cancellation, until the thread noticed, since its folder is removed then."""
    working = asyncio.ensure_future(work)
    try:
        return await shielded(working)
    except asyncio.CancelledError:
        progress.stop()
        while not working.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((working,))
        raise
