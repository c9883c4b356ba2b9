"""``python -m inference_service.startup.ranks.rank STEPS CONTROL MEMORY``: a rank beside the first one.

The numbers are descriptors of sockets to the process of the engine, see `inference_service.startup.ranks.host`,
and of the memory of all ranks; the rank ends when the sockets are closed.
"""

import sys

from loramux_shared import parent

if __name__ == "__main__":
    parent.watch(int(sys.argv[2]))  # what follows takes seconds to import

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import structlog
import torch

from inference_service.adapters.disk import open_disk_tier
from inference_service.adapters.loader import Packer, one_thread
from inference_service.adapters.reading import BundleReader
from inference_service.adapters.workers import Workers
from inference_service.engine.backends.operations import Backend
from inference_service.engine.execution.graphs import CudaRecorder
from inference_service.engine.lora.packed import PackedAdapter
from inference_service.startup.base import set_threads, shard_of
from inference_service.startup.choose import choose_backend
from inference_service.startup.memory import bound_arenas, give_back
from inference_service.startup.merged import merge_into
from inference_service.startup.model import read_model
from inference_service.startup.ranks.group import SharedMemory, group_of
from inference_service.startup.ranks.host import HEARTBEAT_S
from inference_service.startup.ranks.work import Follower
from inference_service.store import open_replica_store
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.generation import Generation
from loramux_shared.faults import Fault, InternalFault, ResourcesExhausted, fault_to
from loramux_shared.process import log_to_stderr
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.checkpoint import PlacedBase

log = structlog.get_logger()


class Control:
    """The socket of questions, and of signs of life; the process ends when it is closed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        threading.Thread(target=self._live, name="alive", daemon=True).start()

    def next(self) -> Any:
        """Wait for a question."""
        try:
            return msgpack.unpackb(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    def answer(self, number: int, work: Callable[[], Any]) -> None:
        """Do what was asked for, and send the result or the fault."""
        try:
            found = [number, True, work()]
        except Exception as error:  # noqa: BLE001 - the engine's process gets it
            found = [number, False, fault_to(_fault(error))]
        self._send(found)

    def _live(self) -> None:
        while True:
            self._send([0, True, None])
            time.sleep(HEARTBEAT_S)

    def _send(self, message: list[Any]) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(msgpack.packb(message))
        except OSError:
            os._exit(0)


class Rank(Follower):
    """A rank: its part of the base, its bank, and the steps that it follows."""

    def __init__(self, shared: int, facts: dict[str, Any]) -> None:
        """Read the rank's part of the base; shared is the descriptor of the memory of all ranks.

        Raises:
            ResourcesExhausted: operations could not be compiled here, and could for the first rank.
            Fault: what `read_model` raises.
        """
        settings = self._settings = InferenceSettings(**facts["settings"])
        log_to_stderr(settings.log_format)
        set_threads(settings)
        generation = Generation.model_validate_json(facts["generation"])
        placed = PlacedBase(generation.base, Path(facts["folder"]), Path(facts["cache"]))
        with placed.small_files() as folder:
            config = read_config(folder, generation.max_seq_len)
        shard = shard_of(settings, config, facts["rank"])
        assert shard is not None  # noqa: S101 - there are several
        self._backend: Backend = choose_backend(settings, shard.config)
        if (found := type(self._backend.operations).__name__) != facts["operations"]:
            raise ResourcesExhausted(
                f"expected operations like the first rank's, {facts['operations']}, found {found}: "
                f"{self._backend.computing.how}. Free room in LORAMUX_CACHE_DIR, or set LORAMUX_NATIVE=false."
            )
        memory = SharedMemory(shard.world, shared)
        self._ranks = group_of(shard, self._backend.operations, memory)
        self._meeting, self._placed = Path(facts["meeting"]), placed
        model = read_model(placed, config, self._backend, self._ranks)
        super().__init__(model, self._backend.new_lora(), partial(CudaRecorder, model.device))
        store = open_replica_store(settings)
        disk = open_disk_tier(settings.cache_dir, settings.adapter_disk_gb, store.uri)
        self._bundles = BundleReader(store, disk)
        self._packer: Packer | None = None
        self._packed: dict[int, PackedAdapter] = {}
        give_back()

    def meet(self) -> None:
        """Meet the other ranks."""
        self._ranks.meet(self._meeting, self._model.device, self._settings.step_timeout_s)

    def open(self, num_bytes: int, max_rank: int, num_slots: int, host_bytes: int) -> None:
        """Take the memory of the bank."""
        self._lora.open(num_bytes, max_rank, num_slots, host_bytes)
        new_lora, size = self._backend.new_lora, self._settings.block_size
        self._packer = Packer(self._model, self._lora, new_lora, size, max_rank)

    def pack(self, number: int, digest: str) -> None:
        """Read, verify and pack the rank's part of an adapter."""
        assert self._packer is not None  # noqa: S101 - the bank is open
        with self._bundles.reading(digest) as found:
            self._packed[number] = self._packer(found.bundle)

    def merge(self, digest: str) -> None:
        """Merge an adapter into the rank's part of the base."""
        with self._bundles.reading(digest) as found:
            merge_into(self._model, self._placed, found.bundle)

    def copy(self, number: int, offset: int) -> None:
        """Copy what was packed into the bank."""
        self._lora.copy(self._packed[number], offset)

    def forget(self, numbers: list[int]) -> None:
        """Let go of what was packed; a slot has it still."""
        for number in numbers:
            self._packed.pop(number, None)

    def enter(self, slot: int, offset: int, number: int) -> None:
        """Give a slot to what was copied."""
        self._lora.enter(slot, offset, self._packed[number])

    def leave(self, slot: int) -> None:
        """Empty a slot."""
        self._lora.leave(slot)

    @property
    def threads(self) -> int:
        """Threads that pack adapters."""
        return self._settings.adapter_threads


def main() -> int:
    """Compute until the engine's process closes the sockets; signals are that one's to take."""
    parent.imported()
    log_to_stderr()
    bound_arenas()
    steps, control, shared = map(int, sys.argv[1:])
    run(Connection(steps), Control(Connection(control)), shared)
    return 0


def run(steps: Connection, control: Control, shared: int) -> None:
    """Load the rank's part, then compute what every message says; adapters are packed on other threads."""
    loaded: list[Rank] = []
    question, _, facts = control.next()
    control.answer(question, lambda: loaded.append(Rank(shared, facts)))
    if not loaded:
        control.next()  # the engine's process closes the sockets
        return
    [rank] = loaded
    rank.meet()
    workers = Workers("adapters", rank.threads, prepare=one_thread)
    torch.set_num_threads(torch.get_num_threads())  # of threads that are not yet begun
    threading.Thread(target=_take, args=(rank, control, workers), name="questions", daemon=True).start()
    while True:
        try:
            name, *arguments = msgpack.unpackb(steps.recv_bytes())
        except (EOFError, OSError):
            return
        getattr(rank, name)(*arguments)


def _take(rank: Rank, control: Control, workers: Workers) -> None:
    """Take questions, and have other threads do what they ask for."""
    while True:
        number, name, *arguments = control.next()
        workers.submit(partial(control.answer, number, partial(getattr(rank, name), *arguments)))


def _fault(error: Exception) -> Fault:
    if isinstance(error, Fault):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return ResourcesExhausted("the memory does not suffice for its part. Free memory, or take more ranks.")
    log.error("rank: unexpected error", exc_info=error)
    return InternalFault("internal error; the log has the details.")


if __name__ == "__main__":
    sys.exit(main())
