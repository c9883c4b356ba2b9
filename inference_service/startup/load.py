"""The start of a replica, from settings to a service that is ready: generation, base, adapters, engine."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, cast

import structlog
import torch

from inference_service.adapters.adapter_set import AdapterSet
from inference_service.adapters.catalog import Catalog
from inference_service.adapters.changing import StoredBundles
from inference_service.adapters.fixed import AllResident
from inference_service.adapters.follower import Follower
from inference_service.adapters.loader import ProofReplay
from inference_service.adapters.manager import AdapterManager
from inference_service.adapters.ports import Publisher, Resolver
from inference_service.adapters.reading import BundleReader
from inference_service.adapters.resolving import ResolverOpener
from inference_service.adapters.views import Facts
from inference_service.backends.base import LoraBackend
from inference_service.backends.triton_lora import TritonLora
from inference_service.core.adapter import MOST_PARTS, Adapter
from inference_service.core.computing import Computing
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.graphs import CudaRecorder
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import Residents
from inference_service.engine.runner import Blocks, Runner
from inference_service.kernels.cpu.spin import Spinning
from inference_service.models.packed import named
from inference_service.serving.engine_driver import EngineDriver
from inference_service.serving.engine_thread import EngineThread, Inbox
from inference_service.serving.service import GenerationService
from inference_service.serving.telemetry.record import Watcher
from inference_service.serving.terms import ServingLimits
from inference_service.startup.bank import OpenBank, open_bank, preload, preload_later
from inference_service.startup.base import (
    LoadedBase,
    agree,
    describe_weights,
    load_base,
    reading_of,
    set_threads,
)
from inference_service.startup.draft import open_draft
from inference_service.startup.memory import (
    SCRATCH_BLOCKS,
    CudaMemory,
    Measured,
    blocks_of,
    bound_arenas,
    divide_memory,
    give_back,
    largest_step,
    measure,
    measure_graph,
)
from inference_service.startup.merged import merge
from inference_service.startup.ranks.start import ReplicaRanks
from inference_service.store import open_batches
from loramux_shared.bases.memory import GB
from loramux_shared.bundle.deployments import require_deployment
from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Merge
from loramux_shared.ports import registered
from loramux_shared.process import report
from loramux_shared.runtime import Pooling
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.open import open_sources
from loramux_shared.storage.base import Store
from loramux_shared.wording import counted

log = structlog.get_logger()

IN_STEPS: Final = 64
"""Adapters that take part in the step by which memory is measured, at most."""


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
) -> Ready:
    """Load the deployment's current generation; every byte is verified before it is used.

    Of its adapters the first ones are loaded, as many as settings say and the bank holds; the others are
    registered, and loaded at their first request, or while their place is free. Watchers hear of
    every request that is served.

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
    set_threads(settings)
    base = load_base(generation, settings, sources)
    if base.config.encodes:
        settings = settings.model_copy(update={"prefix_cache": False})
        generation = generation.model_copy(update={"merge": Merge.NEVER})
    with nullcontext() if base.host is None else base.host.ending_where_it_raises():
        if generation.speculator is not None and settings.speculative_tokens != 0:
            lookup = open_draft(settings, generation, base, sources, _runner)
            base = replace(base, lookup=lookup)
        return _begin(settings, store, generation, base, started, watchers, publisher)


def _begin(
    settings: InferenceSettings,
    store: Store,
    generation: Generation,
    base: LoadedBase,
    started: float,
    watchers: Sequence[Watcher],
    publisher: Publisher | None,
) -> Ready:
    """Make everything else of a base that is loaded."""
    inbox = Inbox()
    bank: OpenBank | None = None
    models = [base.served(generation)]
    if generation.merged is not None:
        models.append(merge(generation, base, store, settings.block_size))
    else:
        bank = open_bank(generation, base, store, settings, inbox)
    most_mixed = min(MOST_PARTS, settings.max_batch_adapters)
    catalog = Catalog(generation.number, generation.served_model_name, models, most_mixed)
    catalog.apply(generation)
    registered = [model.adapter for model in catalog.everything if model.adapter is not None]
    fitting = bank.fitting(registered) if bank is not None else []
    if bank is not None and (first := fitting[: settings.preload]):
        report(f"loading {counted(len(first), 'adapter')}")
        preload(bank, first, inbox)
    engine, limits = _engine(settings, generation, base, bank)
    probe = partial(_run_a_few_tokens, engine, bank, encodes=base.config.encodes)
    probe()  # so that the first request does not wait for buffers and kernels of the first use
    load_s = time.monotonic() - started
    computing = _computing(base)
    report(f"{computing.product}; {computing.reading}")
    dtype = named(base.backend.dtype)
    rank, ranks = generation.max_lora_rank, settings.tensor_parallel or 1
    facts = Facts(settings.deployment, datetime.now(UTC), dtype, rank, load_s, computing, ranks)
    _log_loaded(generation, base, bank, engine, limits, registered, facts)
    if slow := computing.warning:
        log.warning("operations are slower than possible", why=slow)
        report(f"slow operations: {slow}")
    thread = EngineThread(
        engine,
        settings.max_queue,
        probe,
        step_timeout_s=settings.step_timeout_s,
        interval_s=settings.sizes(base.model.device.type).interval_ms / 1e3,
        inbox=inbox,
        after_step=Spinning(settings.spin).look if base.model.device.type == "cpu" else None,
    )
    ends = base.config.eos_token_ids
    hidden = base.config.dims.hidden
    residency = AllResident(catalog) if bank is None else bank.residency
    device = base.model.device.type

    def draft(newer: Generation) -> None:
        engine.draft(settings.sizes(device, newer.drafted).speculative)

    adapters = AdapterSet(catalog, residency, inbox.post, draft)
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
    resolver = None if publisher is None else _open_resolver(manager, catalog, store)
    if generation.resolve is not None and resolver is None:
        missing = "LORAMUX_BUILDER" if publisher is None else "a package that brings a resolver"
        log.warning("requests cannot add adapters, though the deployment allows it", missing=missing)
    driver = EngineDriver(
        catalog,
        thread,
        base.text,
        ends,
        adapters=manager,
        follower=follower,
        texts=base.texts(BundleReader(store, None)) if bank is None else bank.texts,
        resolver=resolver,
        metrics_models=settings.metrics_models,
    )
    service = GenerationService(
        driver,
        base.text,
        ServingLimits(limits.max_seq_len, ends, hidden, base.config.encodes, base.config.token_types),
        driver.metrics,
        watchers,
        pooling_of_base=base.pooling,
        parsers_of=settings.parsers,
        logprobs_mode=settings.logprobs_mode,
        batches=open_batches(settings),
    )
    if bank is not None:
        preload_later(bank, fitting[settings.preload :], inbox)
    return Ready(
        service, thread, adapters, follower, generation, bank, resolver, base.host, base.model.device.type
    )


def _open_resolver(manager: AdapterManager, catalog: Catalog, store: Store) -> Resolver | None:
    """Return what adds adapters that requests name; None where no package has it."""
    for opener in registered("resolver", ResolverOpener).values():
        return opener.open_resolver(manager, catalog, store)
    return None


def _computing(base: LoadedBase) -> Computing:
    """Return what computes, with what a token takes at least where a processor reads the weights."""
    backend = base.backend
    if backend.device.type != "cpu":
        return backend.computing
    return reading_of(backend, base.config, base.model.linears())


def _engine(
    settings: InferenceSettings, generation: Generation, base: LoadedBase, bank: OpenBank | None
) -> tuple[Engine, SchedulerLimits]:
    """Size the cache from what is free, the longest sequence from the cache, and make the engine."""
    model, backend = base.model, base.backend
    sizes = settings.sizes(model.device.type, generation.drafted)
    block_size = settings.block_size
    lora = backend.new_lora() if bank is None else bank.lora
    residents: Residents = Residents() if bank is None else bank.residency
    resident = [] if bank is None else bank.residency.resident()[:IN_STEPS]

    encodes = model.config.encodes

    def limits_of(longest: int) -> SchedulerLimits:
        return SchedulerLimits(
            max(sizes.tokens, longest) if encodes else sizes.tokens,
            sizes.seqs,
            settings.max_batch_adapters,
            longest,
            # a state that took in a token which did not hold cannot be cut back
            speculative_tokens=0 if model.config.state_bytes(1) or encodes else sizes.speculative,
            whole=encodes,
            prefill_first=settings.prefill_first,
        )

    def measured(longest: int) -> Measured:
        of_step = limits_of(longest)
        batch = largest_step(of_step, resident, block_size)
        new_runner = partial(_runner, base, lora, SCRATCH_BLOCKS, block_size, of_step)
        memory = CudaMemory(model.device)
        step = measure(new_runner, batch, memory)
        return replace(step, graph=measure_graph(new_runner, memory), free=memory.settled())

    plan = divide_memory(
        settings,
        generation.max_seq_len,
        model,
        lora.num_bytes,
        promised=0 if bank is None else bank.promised,
        graphs=backend.recordable,
        measure=measured if model.device.type == "cuda" and not encodes else None,
    )
    limits = replace(limits_of(plan.max_seq_len), max_seqs=plan.seqs)
    blocks = blocks_of(plan, model.config, settings)
    runner = _runner(base, lora, plan.blocks, block_size, limits, plan.slots)
    if backend.recordable:
        _record(runner, model.device)
        for proofs in registered("replay", ProofReplay).values() if base.host is None else ():
            proofs.rehearse(backend.new_lora(), model, block_size)
    return Engine(runner, limits, blocks, residents, lookup=base.lookup), limits


def _run_a_few_tokens(engine: Engine, bank: OpenBank | None, *, encodes: bool) -> None:
    """Run what works as long as anything does: the base, and an adapter where one is resident."""
    resident: list[Adapter] = [] if bank is None else bank.residency.resident()
    sampling, pooling = SamplingParams(max_tokens=0 if encodes else 2), Pooling.MEAN if encodes else None
    for adapter in [None, *resident[:1]]:
        engine.add(EngineSequence("warm-up", [0, 0], sampling, adapter, pooling=pooling))
        while not engine.idle:
            engine.step()


def _log_loaded(
    generation: Generation,
    base: LoadedBase,
    bank: OpenBank | None,
    engine: Engine,
    limits: SchedulerLimits,
    registered: Sequence[Adapter],
    about: Facts,
) -> None:
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
        adapters=len(registered) or len(generation.adapters),
        **facts,
        merged=generation.merged or "none",
        kv_tokens=stats.blocks_total * stats.block_size,
        kv_cache_dtype=named(backend.cache_dtype or backend.dtype),
        max_seq_len=limits.max_seq_len,
        seconds=round(about.load_s, 2),
    )


def _runner(
    base: LoadedBase,
    lora: LoraBackend,
    blocks: Blocks,
    block_size: int,
    limits: SchedulerLimits,
    slots: int = 1,
) -> Runner:
    """Return a runner with a cache of its own; one that can replay steps has recorded none yet."""
    model = base.model
    if base.host is not None:
        recorded = limits if base.backend.recordable else None
        runner = base.host.runner(model, lora, blocks, block_size, recorded, slots)
    elif base.backend.recordable:
        segmented = cast(TritonLora, lora)  # what `recordable` promises
        recorder = CudaRecorder(model.device)
        runner = GraphRunner(model, segmented, blocks, block_size, limits, recorder, slots)
    else:
        runner = Runner(model, lora, blocks, block_size, slots)
    if limits.speculative_tokens:
        runner.depth = 0  # a draft follows tokens that are known
    return runner


def _record(runner: Runner, device: torch.device) -> None:
    memory = CudaMemory(device)
    before = memory.settled()
    report("recording steps")
    runner.capture()
    log.info("memory", item="recorded steps", gb=round((before - memory.settled()) / GB, 3))
