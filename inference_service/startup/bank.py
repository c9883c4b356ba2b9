"""The bank of adapters, and everything that brings adapters into it."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from inference_service.adapters.disk import open_disk_tier
from inference_service.adapters.loader import AdapterLoader, Pack, Packer
from inference_service.adapters.reading import BundleReader
from inference_service.adapters.texts import AdapterTexts
from inference_service.core.adapter import Adapter
from inference_service.driver.engine_thread import Inbox
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.lora.places import Places
from inference_service.engine.scheduling.residency import Residency
from inference_service.engine.scheduling.residents import BankMemory
from inference_service.startup.base import LoadedBase
from inference_service.startup.memory import free_bytes, host_memory, plan_host_tier
from loramux_shared.bases.memory import GB, USUAL_RANK, adapter_bytes, plan_bank
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import read_manifest
from loramux_shared.settings import InferenceSettings
from loramux_shared.storage.base import Store

log = structlog.get_logger()

MAX_SLOTS: Final = 4096
"""Adapters that are resident at once, at most."""
MAX_TABLES: Final = 256 << 20
"""Bytes of the tables of all slots: of dense bases 4,096 take less, of mixtures each may take a megabyte."""
LEAST_SLOTS: Final = 64
"""Lower bound of the slots, whatever a slot takes."""
PACKING: Final = 1.03
"""Factor by which alignment enlarges an adapter's matrices, at most, but for the smallest ones."""
SPARE: Final = 1.0625
"""Locked host memory for each byte of adapters that it keeps: pieces of different sizes leave holes."""
UNDER_WAY: Final = 4
"""Adapters that are packed and not yet kept, or not yet copied."""
COPY_WAIT_S: Final = 0.005
"""Seconds of a step for adapters that are being copied into a bank on a CPU.

Ten megabytes take half a millisecond.
"""
PROBES: Final = 16
"""Manifests that are read where a generation of an older release does not tell what its adapters take."""


@dataclass(frozen=True)
class OpenBank:
    """The adapters of a replica."""

    lora: LoraBackend
    residency: Residency
    loader: AdapterLoader
    texts: AdapterTexts
    sizes: dict[str, int]
    """About what each registered adapter takes of the bank, by digest."""

    @property
    def promised(self) -> int:
        """Bytes of the host that adapters may take and have not yet: memory that comes when it is written."""
        cpu = self.lora.home.type == "cpu" and self.lora.name != "triton"
        return self.residency.capacity - self.residency.num_bytes if cpu else 0

    def close(self) -> None:
        """End the threads."""
        self.loader.close()
        self.texts.close()

    def fitting(self, adapters: Iterable[Adapter]) -> list[Adapter]:
        """Return the first of them, as many as fit the bank together."""
        found, left = [], self.residency.capacity
        for adapter in dict.fromkeys(adapters):
            left -= self.sizes.get(adapter.digest, 0)
            if left < 0:
                break
            found.append(adapter)
        return found


def open_bank(
    generation: Generation, base: LoadedBase, store: Store, settings: InferenceSettings, inbox: Inbox
) -> OpenBank:
    """Take the memory of the bank, and be ready to bring adapters in.

    Raises:
        ResourcesExhausted: the largest adapter does not fit it.
        BundleCorrupt: a manifest that had to be read is damaged.
        StoreUnavailable: the store does not answer.
    """
    config, backend, device = base.model.config, base.backend, base.model.device
    item_bytes = base.model.dtype.itemsize
    sizes = _sizes(generation, item_bytes, store)
    usual = adapter_bytes(config, item_bytes, min(USUAL_RANK, generation.max_lora_rank))
    ranks = 1 if base.host is None else base.host.world
    free = free_bytes(device, ranks)
    num_bytes = plan_bank(sizes.values(), free, settings, device.type, usual=usual)
    lora = backend.new_lora()
    slots = min(MAX_SLOTS, max(LEAST_SLOTS, MAX_TABLES // max(1, lora.slot_bytes)))
    host_bytes = plan_host_tier(settings, host_memory().free, ranks) if device.type == "cuda" else 0
    largest = max(sizes.values(), default=usual)
    opened = num_bytes, generation.max_lora_rank, slots, int(host_bytes * SPARE) + UNDER_WAY * largest
    pack: Pack = Packer(base.model, lora, backend.new_lora, settings.block_size, generation.max_lora_rank)
    bank: BankMemory = lora
    if base.host is None:
        lora.open(*opened)
    else:
        pack, bank = base.host.open_bank(lora, pack, *opened)
    median = int(statistics.median(sizes.values())) if sizes else usual
    held = num_bytes // max(1, median)
    log.info("memory", item="bank of adapters", gb=round(num_bytes / GB, 3), holds_like_the_median=held)
    disk = open_disk_tier(settings.cache_dir, settings.adapter_disk_gb, store.uri)
    reader = BundleReader(store, disk)
    loader = AdapterLoader(reader, pack, host_bytes=host_bytes, threads=settings.adapter_threads)
    wait_s = COPY_WAIT_S if device.type == "cpu" else 0.0
    residency = Residency(Places(num_bytes), slots, bank, loader, inbox.post, wait_s=wait_s)
    return OpenBank(lora, residency, loader, base.texts(reader), sizes)


def preload(bank: OpenBank, adapters: Sequence[Adapter], inbox: Inbox) -> None:
    """Load adapters before anything is served.

    An adapter that cannot be loaded fails its own requests later.
    """
    for adapter in adapters:
        bank.residency.prefetch(adapter)
    bank.residency.bring_in({})
    while not bank.residency.settled:
        inbox.receive()
        bank.residency.bring_in({})


def preload_later(bank: OpenBank, adapters: Sequence[Adapter], inbox: Inbox) -> None:
    """Have adapters loaded while others are served, as long as there is room."""
    inbox.post(partial(bank.residency.prefetch_later, adapters))


def _sizes(generation: Generation, item_bytes: int, store: Store) -> dict[str, int]:
    """Return about what each adapter takes of the bank, by digest."""
    found: dict[str, int] = {}
    unknown: list[str] = []
    for record in generation.adapters.values():
        if record.summary is None:
            unknown.append(record.digest)
        else:
            elements = record.summary.weights_bytes // generation.lora_dtype.itemsize
            found[record.digest] = _packed(elements, item_bytes)
    for digest in unknown[:PROBES]:
        manifest = read_manifest(store, digest)
        found[digest] = _packed(manifest.weights_bytes // manifest.dtype.itemsize, item_bytes)
    return dict.fromkeys(unknown, max(found.values(), default=0)) | found


def _packed(elements: int, item_bytes: int) -> int:
    return int(elements * item_bytes * PACKING)
