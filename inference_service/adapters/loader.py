"""Brings adapters from the store, the disk or the host's memory to a backend's bank: packed, and proved."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeVar

import structlog
import torch

from inference_service.adapters.reading import BundleReader, FoundBundle, Tier
from inference_service.adapters.recent import Recent
from inference_service.adapters.workers import Workers
from inference_service.core.adapter import Adapter
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.execution.graph_runner import ROOM
from inference_service.engine.kernels.launch import stream_of
from inference_service.engine.lora.packed import PackedAdapter
from inference_service.engine.lora.places import ALIGNMENT
from inference_service.engine.lora.weights import (
    AdapterWeights,
    check_vocabulary,
    in_order,
    load_adapter,
    part_of,
    values_of,
)
from inference_service.engine.models.decoder import Decoder
from loramux_shared.bundle.manifest import REBUILD, Manifest
from loramux_shared.bundle.proof import Proof
from loramux_shared.bundle.reader import Bundle
from loramux_shared.faults import (
    BundleCorrupt,
    Fault,
    InternalFault,
    ProofFailed,
    ResourcesExhausted,
    ShuttingDown,
)
from loramux_shared.ports import required

log = structlog.get_logger()

Pack = Callable[[Bundle], PackedAdapter]
"""Packs an adapter for a bank."""

ARRANGED_BYTES: Final = 32 << 20
"""Bytes of the arrangements of bundles that were packed before: 6,000 adapters of a small dense base."""
DIGEST_DIGITS: Final = 12
"""Characters of a digest that stand for an adapter where its name is not known."""


class Replayed(Protocol):
    """The differences of a replay from its proof."""

    @property
    def logprob(self) -> float:
        """Return the largest one of a logprob."""

    @property
    def effect(self) -> float:
        """Return the largest one of what the adapter adds, relative to it."""


@dataclass(frozen=True)
class ProofReplay:
    """The port of what replays proofs."""

    replay: Callable[[str, Proof, Manifest, Adapter, LoraBackend, Decoder, int], Replayed]
    """Raises ProofFailed where the adapter of a name answers otherwise than its proof says; the last number is
    the tokens of a block of the cache.
    """
    rehearse: Callable[[LoraBackend, Decoder, int], None]
    """Launches what a replay launches, for no adapter, so that the first proof compiles nothing."""


class Packer:
    """Packs adapters for a replica's bank. Calls may come from any thread, one at a time for one digest.

    Proofs run through the model as it is, but with a bank and a cache of their own, so that the replica's are
    neither filled nor waited for.
    """

    def __init__(
        self,
        model: Decoder,
        lora: LoraBackend,
        new_lora: Callable[[], LoraBackend],
        block_size: int,
        max_rank: int = 1,
    ) -> None:
        """Take the parts of the replica; max_rank is the one that its bank was opened for.

        Proofs have it too, so that one of a new rank launches no kernel that has to be compiled first.
        """
        self._model = model
        self._lora = lora
        self._new_lora = new_lora
        self._block_size, self._max_rank = block_size, max_rank
        self._proved: set[str] = set()
        self._arranged: Recent[AdapterWeights] = Recent(ARRANGED_BYTES)
        self._proving = threading.Lock()  # operations may cache what a step of one thread prepared

    def __call__(self, bundle: Bundle, name: str | None = None) -> PackedAdapter:
        """Pack a bundle; a proof that fails names the adapter so, or by its digest.

        Raises:
            BundleCorrupt: it has rows that the base has no place for, or tokens without rows.
            ResourcesExhausted: it has more tokens of its own than recorded steps have room for.
            ProofFailed: the adapter answers otherwise than its proof says.
        """
        config, ranks = self._model.config, self._model.ranks
        if ranks is not None and bundle.manifest.proof is not None:
            raise ProofFailed(
                f"the adapter has a proof, which {ranks.shard.world} tensor-parallel ranks cannot replay. "
                "Build the deployment without proofs, or serve it with LORAMUX_TENSOR_PARALLEL=1."
            )
        check_vocabulary(bundle.manifest, (config if ranks is None else ranks.shard.whole).dims)
        room = (bundle.manifest.vocab or 0) - config.dims.vocab
        if room > ROOM and self._model.device.type == "cuda":
            raise ResourcesExhausted(
                f"the adapter has {room} tokens more than the base, and a GPU's steps have room for {ROOM}. "
                "Train it with fewer, or merge it into the base and serve a full model."
            )
        weights = self._weights(bundle)
        packed = self._lora.pack(weights if ranks is None else part_of(weights, ranks.shard))
        if bundle.digest not in self._proved:
            self.prove(bundle, packed, name or bundle.digest[:DIGEST_DIGITS])
            self._proved.add(bundle.digest)
        return packed

    def _weights(self, bundle: Bundle) -> AdapterWeights:
        """Return what a bundle holds; where each matrix lies is known from the first time."""
        dtype, home = self._model.dtype, self._lora.home
        known = self._arranged.get(bundle.digest)
        if known is not None:
            return in_order(replace(known, values=values_of(bundle, dtype, home)))
        ranks = self._model.ranks
        config = self._model.config if ranks is None else ranks.shard.whole
        weights = load_adapter(bundle, config.layer_groups, dtype, home)
        if weights.vocabulary is None and not weights.vectors:  # the bundle has all tensors
            size = weights.ranks.nbytes + weights.first_a.nbytes + weights.first_b.nbytes
            self._arranged.put(bundle.digest, replace(weights, values=torch.empty(0)), size)
        return weights

    def prove(self, bundle: Bundle, packed: PackedAdapter, name: str) -> None:
        """Replay the proof of a bundle, where it has one; raise ProofFailed, with the adapter's name, where the
        adapter answers otherwise.
        """
        manifest, began = bundle.manifest, time.monotonic()
        if manifest.proof is None:
            return
        with self._proving, _beside_the_steps(self._model.device):
            lora = self._new_lora()
            num_bytes = -(-packed.num_bytes // ALIGNMENT) * ALIGNMENT
            lora.open(num_bytes, max(packed.max_rank, self._max_rank), 1)
            lora.copy(packed, 0)
            lora.enter(0, 0, packed)
            adapter = Adapter(bundle.digest, 0)
            proofs = required("replay", ProofReplay, "a bundle with a proof")
            replayed = proofs.replay(
                name, manifest.proof, manifest, adapter, lora, self._model, self._block_size
            )
        log.info(
            "adapter passed its proof",
            adapter=name,
            effect=replayed.effect,
            logprob=replayed.logprob,
            seconds=round(time.monotonic() - began, 3),
        )


def _beside_the_steps(device: torch.device) -> AbstractContextManager[object]:
    """Compute on the stream of proofs, where there are streams: on the steps' they would wait."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(stream_of("proofs", device))


T = TypeVar("T")

LOADS: Final = 12
"""Bundles that are read at once: with two requests each in turn, this keeps some 16 requests under way."""


class AdapterLoader:
    """Loads adapters on threads of its own, each digest once at a time.

    What `load` and `run` are given is called exactly once for every call, on one of these threads. pack
    makes a verified bundle into what the backend copies, and proves it; it runs on ``threads`` threads. Nothing
    is tried again here: the caller decides that.
    """

    def __init__(self, reader: BundleReader, pack: Pack, *, host_bytes: float = 0, threads: int = 1) -> None:
        self._reader = reader
        self._pack = pack
        self._host: Recent[PackedAdapter] = Recent(host_bytes)
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Callable[[PackedAdapter | Fault, str], None]]] = {}
        self._reads = Workers("bundles", LOADS)
        # One thread computes: teams of threads would wait for each other, and take cores from the steps.
        self._work = Workers("adapters", threads, prepare=one_thread)
        torch.set_num_threads(torch.get_num_threads())  # of threads that are not yet begun

    @property
    def host_bytes(self) -> int:
        """Memory of what the host tier holds."""
        return self._host.size

    def load(self, adapter: Adapter, done: Callable[[PackedAdapter | Fault, str], None]) -> None:
        """Begin to bring an adapter to packed host memory; two loads of one digest at once are one.

        done is called with that and the tier where it was found, or with a fault and an empty text.
        """
        digest = adapter.digest
        with self._lock:
            if digest in self._waiting:
                self._waiting[digest].append(done)
                return
            self._waiting[digest] = [done]
        packed = self._host.get(digest)
        if packed is None:
            self._ended(self._reads.submit(partial(self._bring, adapter)), digest)
            return
        self._ended(self._work.submit(partial(self._finish, digest, packed, Tier.HOST), urgent=True), digest)

    def run(self, work: Callable[[], T], done: Callable[[T | Fault], None]) -> None:
        """Do other work on these threads, before the packing that waits: a copy into the bank."""
        future = self._work.submit(lambda: _tell(done, _outcome(work)), urgent=True)
        future.add_done_callback(lambda ended: _tell(done, _stopped()) if ended.cancelled() else None)

    def forget(self, digest: str) -> None:
        """Let the host tier's copy go."""
        self._host.drop(digest)

    def close(self) -> None:
        """End the threads; what has not begun ends with SHUTTING_DOWN."""
        self._reads.close()
        self._work.close()
        self._reader.close()

    def _bring(self, adapter: Adapter) -> None:
        """Read a bundle, have it packed, and keep it on the disk meanwhile; on a thread for reading."""
        digest = adapter.digest
        try:
            with self._reader.reading(digest) as found:
                _expect_invocation(found.bundle, adapter.invocation)
                packing = self._work.submit(partial(self._pack_and_finish, digest, found))
                self._ended(packing, digest)
                self._reader.keep(found)
                wait([packing])  # the bundle's memory counts until then
        except Exception as error:  # noqa: BLE001 - the waiters get it
            self._finish(digest, _fault(error))

    def _pack_and_finish(self, digest: str, found: FoundBundle) -> None:
        outcome = _outcome(partial(self._pack, found.bundle))
        if isinstance(outcome, Fault):
            self._finish(digest, outcome)
            return
        self._host.put(digest, outcome, outcome.num_bytes)
        self._finish(digest, outcome, found.tier)

    def _finish(self, digest: str, outcome: PackedAdapter | Fault, tier: str = "") -> None:
        """Resolve all waiters of a digest; later calls begin a new load."""
        with self._lock:
            waiting = self._waiting.pop(digest, ())
        for done in waiting:
            _tell(done, outcome, tier)

    def _ended(self, future: Future[None], digest: str) -> None:
        """Resolve the waiters of cancelled work."""
        future.add_done_callback(lambda ended: self._finish(digest, _stopped()) if ended.cancelled() else None)


def _expect_invocation(bundle: Bundle, tokens: tuple[int, ...]) -> None:
    """Requests match these tokens before the bundle is read."""
    found = bundle.manifest.invocation_tokens
    if found != tokens:
        raise BundleCorrupt(
            f"bundle {bundle.digest[:12]}: expected invocation_tokens {list(tokens)} as the generation says, "
            f"found {list(found)}. {REBUILD}"
        )


def _outcome(work: Callable[[], T]) -> T | Fault:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the waiters get it
        return _fault(error)


def _fault(error: Exception) -> Fault:
    """Return what clients get of a failure; one of ours is logged here, and named as such."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        log.warning("adapter load failed: out of memory", problem=str(error)[:200])
        return ResourcesExhausted(
            "an adapter does not fit this machine's free memory. Free memory, or use less."
        )
    log.error("adapter load failed: unexpected error", exc_info=error)
    return InternalFault("internal error while an adapter was loaded; the log has the details.")


def _stopped() -> Fault:
    return ShuttingDown("the replica shuts down and loads no further adapters. Retry with another replica.")


def _tell(done: Callable[..., None], *outcome: object) -> None:
    try:
        done(*outcome)
    except Exception:
        log.exception("adapter load callback raised")  # the others still run


def one_thread() -> None:
    """Let this thread compute alone. Asked for the first time, torch takes the process's number: ask before."""
    torch.get_num_threads()
    torch.set_num_threads(1)
