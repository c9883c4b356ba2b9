"""The start of a replica, from settings to a service that is ready: generation, base, adapters, engine."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
import torch

from inference_service.adapters.adapter_set import AdapterSet
from inference_service.adapters.catalog import Catalog
from inference_service.adapters.changing import StoredBundles
from inference_service.adapters.fixed import AllResident
from inference_service.adapters.follower import Follower
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.ports import Publisher, Resolver
from inference_service.adapters.reading import BundleReader
from inference_service.adapters.resolving import ResolverOpener
from inference_service.adapters.views import Facts
from inference_service.api.requests.service import GenerationService
from inference_service.api.requests.terms import ServingLimits
from inference_service.core.adapter import MOST_PARTS, Adapter
from inference_service.core.computing import Computing
from inference_service.driver.engine_driver import EngineDriver
from inference_service.driver.engine_thread import EngineThread, Inbox
from inference_service.driver.telemetry.record import Watcher
from inference_service.engine.engine import Engine
from inference_service.engine.kernels.cpu.spin import Spinning
from inference_service.engine.models.packed import named
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup.bank import OpenBank, open_bank, preload, preload_later
from inference_service.startup.base import (
    LoadedBase,
    agree,
    describe_weights,
    load_base,
    reading_of,
    set_threads,
)
from inference_service.startup.cards import cards_of, sole_start
from inference_service.startup.draft import open_draft
from inference_service.startup.engine import BuildEngine, build_engine, run_a_few_tokens, runner_of
from inference_service.startup.memory import bound_arenas, give_back
from inference_service.startup.merged import merge
from inference_service.startup.ranks.start import ReplicaRanks
from inference_service.store import open_batches
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Merge
from loramux_shared.ports import registered
from loramux_shared.process import report
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.wording import counted

log = structlog.get_logger()


@dataclass(frozen=True)
class Ready:
    """A loaded deployment."""

    service: GenerationService
    engine: EngineThread
    adapters: AdapterSet
    follower: Follower
    """It looks for newer generations once it runs."""
    generation: Generation
    """The one that it was loaded with."""
    bank: OpenBank | None
    """None where an adapter is merged into the weights."""
    resolver: Resolver | None
    """None where requests cannot add adapters."""
    host: ReplicaRanks | None
    """The other ranks of tensor parallelism, where there are some."""
    device: str
    """Its kind: cpu or cuda."""


async def load_apart(
    settings: InferenceSettings,
    store: Store,
    watchers: Sequence[Watcher] = (),
    publisher: Publisher | None = None,
) -> Ready:
    """Do what `load` does, in a thread that ends with it: one that lived on would keep its team of OpenMP's.

    With more of their threads than cores, those of a step would sleep between operations
    (`kernels/cpu/spin.py`). What it and its threads freed is the system's again when it returns.
    """
    bound_arenas()
    with ThreadPoolExecutor(1, "load") as thread:
        loop = asyncio.get_running_loop()
        ready = await loop.run_in_executor(thread, load, settings, store, watchers, publisher)
    give_back()
    return ready


def load(
    settings: InferenceSettings,
    store: Store,
    watchers: Sequence[Watcher] = (),
    publisher: Publisher | None = None,
    build: BuildEngine = build_engine,
) -> Ready:
    """Load the deployment's current generation; every byte is verified before it is used.

    Of its adapters the first ones are loaded, as many as settings say and the bank holds; the others are
    registered, and loaded at their first request, or while their place is free. Watchers hear of
    every request that is served. build makes the engine.

    Raises:
        DeploymentNotFound: the store has no such deployment.
        BundleCorrupt: a record, or the bundle that is merged, has another digest.
        ProofFailed: the adapter that is merged answers otherwise than its proof says.
        CheckpointInvalid: the base cannot be served.
        ResourcesExhausted: it does not fit this machine.
        Fault: what the store or the base's source raise.
    """
    started = time.monotonic()
    settings, generation = agree(settings, require_deployment(store, settings.deployment))
    sources = open_sources(
        local_roots=settings.local_roots,
        allowed_hosts=settings.allowed_hosts,
        secrets_dir=settings.secrets_dir,
        work_dir=settings.cache_dir,
    )
    log.info("threads", why=set_threads(settings), threads=torch.get_num_threads())
    with ExitStack() as start:
        start.enter_context(sole_start(cards_of(settings)))
        base = load_base(generation, settings, sources)
        if base.host is not None:
            start.enter_context(base.host.ending_where_it_raises())
        if base.config.encodes:
            settings = settings.model_copy(update={"prefix_cache": False})
            generation = generation.model_copy(update={"merge": Merge.NEVER})
        if generation.speculator is not None and settings.speculative_tokens != 0:
            lookup = open_draft(settings, generation, base, sources, runner_of)
            base = replace(base, lookup=lookup)
        return _begin(settings, store, generation, base, started, watchers, publisher, build)


def _begin(
    settings: InferenceSettings,
    store: Store,
    generation: Generation,
    base: LoadedBase,
    started: float,
    watchers: Sequence[Watcher],
    publisher: Publisher | None,
    build: BuildEngine,
) -> Ready:
    """Make everything else of a base that is loaded."""
    inbox = Inbox()
    bank = open_bank(generation, base, store, settings, inbox) if generation.merged is None else None
    catalog = _open_catalog(settings, store, generation, base)
    served_adapters = [model.adapter for model in catalog.everything if model.adapter is not None]
    fitting = bank.fitting(served_adapters) if bank is not None else []
    if bank is not None and (first := fitting[: settings.preload]):
        report(f"loading {counted(len(first), 'adapter')}")
        preload(bank, first, inbox)
    engine, limits = build(settings, generation, base, bank)
    probe = partial(run_a_few_tokens, engine, bank, generates=base.config.generates)
    probe()  # so that the first request does not wait for buffers and kernels of the first use
    facts = _describe_replica(settings, generation, base, time.monotonic() - started)
    _report_loaded(generation, base, bank, engine, limits, served_adapters, facts)
    thread = _make_thread(settings, base, engine, probe, inbox)
    adapters = _open_adapters(settings, catalog, bank, engine, inbox, base.model.device.type)
    follower = Follower(
        store,
        generation,
        adapters.apply,
        interval_s=settings.follow_interval_s,
        ends=settings.on_base_change == "exit",
    )
    manager = AdapterManager(
        adapters,
        follower,
        facts,
        bundles=None if bank is None else StoredBundles(store, refused=bool(settings.require_signature)),
        publisher=publisher,
        paused=lambda: thread.paused,
    )
    resolver = _open_resolver(generation, manager, catalog, store, publisher)
    driver = EngineDriver(
        catalog,
        thread,
        base.text,
        base.config.eos_token_ids,
        adapters=manager,
        follower=follower,
        texts=base.texts(BundleReader(store, None)) if bank is None else bank.texts,
        resolver=resolver,
        metrics_models=settings.metrics_models,
    )
    service = _make_service(settings, base, driver, limits, watchers)
    if bank is not None:
        preload_later(bank, fitting[settings.preload :], inbox)
    return Ready(
        service, thread, adapters, follower, generation, bank, resolver, base.host, base.model.device.type
    )


def _open_catalog(
    settings: InferenceSettings, store: Store, generation: Generation, base: LoadedBase
) -> Catalog:
    """Return the models of a generation: the base, and the adapter that is merged into it where one is."""
    models = [base.served(generation)]
    if generation.merged is not None:
        models.append(merge(generation, base, store, settings.block_size))
    most_mixed = min(MOST_PARTS, settings.max_batch_adapters)
    catalog = Catalog(generation.number, generation.served_model_name, models, most_mixed)
    catalog.apply(generation)
    return catalog


def _describe_replica(
    settings: InferenceSettings, generation: Generation, base: LoadedBase, load_s: float
) -> Facts:
    """Return the facts of a replica, and report how it computes."""
    computing = _computing(base)
    report(f"{computing.product}; {computing.reading}")
    dtype = named(base.backend.dtype)
    rank, ranks = generation.max_lora_rank, settings.tensor_parallel or 1
    return Facts(settings.deployment, datetime.now(UTC), dtype, rank, load_s, computing, ranks)


def _make_thread(
    settings: InferenceSettings, base: LoadedBase, engine: Engine, probe: Callable[[], None], inbox: Inbox
) -> EngineThread:
    """Return the thread that steps the engine."""
    device = base.model.device.type
    return EngineThread(
        engine,
        settings.max_queue,
        probe,
        step_timeout_s=settings.step_timeout_s,
        interval_s=settings.sizes(device).interval_ms / 1e3,
        inbox=inbox,
        after_step=Spinning(settings.spin).look if device == "cpu" else None,
    )


def _open_adapters(
    settings: InferenceSettings,
    catalog: Catalog,
    bank: OpenBank | None,
    engine: Engine,
    inbox: Inbox,
    device: str,
) -> AdapterSet:
    """Return the adapters that are served; the engine drafts as each newer generation says."""

    def draft(newer: Generation) -> None:
        engine.draft(settings.sizes(device, newer.drafted).speculative)

    residency = AllResident(catalog) if bank is None else bank.residency
    return AdapterSet(catalog, residency, inbox.post, draft)


def _make_service(
    settings: InferenceSettings,
    base: LoadedBase,
    driver: EngineDriver,
    limits: SchedulerLimits,
    watchers: Sequence[Watcher],
) -> GenerationService:
    """Return the service that answers requests through a driver."""
    config = base.config
    return GenerationService(
        driver,
        base.text,
        ServingLimits(
            limits.max_seq_len,
            config.eos_token_ids,
            config.dims.hidden,
            config.encodes,
            config.token_types,
            config.generates,
            base.model.sparse is not None,
        ),
        driver.metrics,
        watchers,
        pooling_of_base=base.pooling,
        prompts_of_base=base.prompts,
        parsers_of=settings.parsers,
        logprobs_mode=settings.logprobs_mode,
        batches=open_batches(settings),
    )


def _open_resolver(
    generation: Generation,
    manager: AdapterManager,
    catalog: Catalog,
    store: Store,
    publisher: Publisher | None,
) -> Resolver | None:
    """Return what adds adapters that requests name; None, with a warning where it is missed, without one."""
    openers = registered("resolver", ResolverOpener).values() if publisher is not None else ()
    resolver = next((opener.open_resolver(manager, catalog, store) for opener in openers), None)
    if generation.resolve is not None and resolver is None:
        missing = "LORAMUX_BUILDER" if publisher is None else "a package that brings a resolver"
        log.warning("requests cannot add adapters, though the deployment allows it", missing=missing)
    return resolver


def _computing(base: LoadedBase) -> Computing:
    """Return what computes, with what a token takes at least where a processor reads the weights."""
    backend = base.backend
    if backend.device.type != "cpu":
        return backend.computing
    return reading_of(backend, base.config, base.model.linears())


def _report_loaded(
    generation: Generation,
    base: LoadedBase,
    bank: OpenBank | None,
    engine: Engine,
    limits: SchedulerLimits,
    served_adapters: Sequence[Adapter],
    about: Facts,
) -> None:
    """Log what a replica serves and how, and warn where it computes slower than the machine can."""
    backend, stats = base.backend, engine.stats
    facts: dict[str, Any] = {} if bank is None else {"resident": len(bank.residency.resident())}
    facts |= {} if base.host is None else {"ranks": base.host.world}
    log.info(
        "loaded",
        deployment=generation.deployment,
        generation=generation.number,
        backend=backend.new_lora().name if bank is None else bank.lora.name,
        operations=about.computing.how,
        product=about.computing.product,
        device=str(backend.device),
        dtype=about.dtype,
        weights=describe_weights(base),
        reading=about.computing.reading,
        threads=torch.get_num_threads(),
        adapters=len(served_adapters) or len(generation.adapters),
        **facts,
        merged=generation.merged or "none",
        kv_tokens=stats.blocks_total * stats.block_size,
        kv_cache_dtype=named(backend.cache_dtype or backend.dtype),
        max_seq_len=limits.max_seq_len,
        seconds=round(about.load_s, 2),
    )
    if slow := about.computing.warning:
        log.warning("operations are slower than possible", why=slow)
        report(f"slow operations: {slow}")
