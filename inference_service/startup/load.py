"""From settings to a service that is ready: generation, base, adapters, engine."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import structlog
import torch

from inference_service.backends.base import Backend, LoraBackend
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Adapter
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner, SegmentedLora
from inference_service.engine.graphs import CudaRecorder
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import SchedulerLimits
from inference_service.lora.loader import matrices
from inference_service.lora.weights import pack_adapter
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.decoder import Decoder
from inference_service.proof.replay import replay
from inference_service.serving.adapter_defaults import read_adapter_defaults
from inference_service.serving.catalog import Catalog, ServedModel, shown_source
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.service import GenerationService, ServingLimits
from inference_service.serving.telemetry.record import Watcher
from inference_service.serving.text import Text
from inference_service.startup.choose import choose_backend
from inference_service.startup.memory import divide_memory
from inference_service.startup.profile import SCRATCH_BLOCKS, CudaMemory, Measured, largest_step, measure
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.memory import GB
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.deployments import current_generation, list_deployments
from loramux_shared.bundle.manifest import Generation
from loramux_shared.bundle.reader import Bundle, read_bundle
from loramux_shared.codes import CODES
from loramux_shared.faults import DeploymentNotFound, ResourcesExhausted
from loramux_shared.settings import InferenceSettings
from loramux_shared.sources.checkpoint import PlacedBase, with_base
from loramux_shared.sources.open import Sources, open_sources
from loramux_shared.storage.base import Store
from loramux_shared.wording import listed

log = structlog.get_logger()


@dataclass(frozen=True)
class Ready:
    """A loaded deployment."""

    service: GenerationService
    engine: EngineThread


def load(settings: InferenceSettings, store: Store, watchers: Sequence[Watcher] = ()) -> Ready:
    """Load the deployment's current generation; every byte is verified before it is used.

    Watchers hear of every request that is served.

    Raises:
        DeploymentNotFound: the store has no such deployment.
        BundleCorrupt: a digest differs.
        ProofFailed: an adapter answers otherwise than its proof says.
        AdapterInvalid: an adapter brings a chat template that cannot be parsed.
        CheckpointInvalid: the base cannot be served.
        ResourcesExhausted: it does not fit this machine.
        Fault: what the store or the base's source raise.
    """
    started = time.monotonic()
    log.info("reading the deployment", deployment=settings.deployment, store=store.uri)
    generation = _generation(settings.deployment, store)
    sources = open_sources(
        local_roots=settings.local_roots,
        allowed_hosts=settings.allowed_hosts,
        secrets_dir=settings.secrets_dir,
        work_dir=settings.cache_dir,
    )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    base = _load_base(generation, settings, sources)
    backend, model = base.backend, base.model
    warned = _warn_about(base.config, model)
    lora = backend.new_lora()
    adapters: list[ServedModel] = []
    for name, record in generation.adapters.items():
        reading = time.monotonic()
        bundle = read_bundle(store, record.digest)
        served = _load_adapter(name, bundle, lora, model, base.text, settings.block_size)
        load_s = time.monotonic() - reading
        adapters.append(replace(served, source=shown_source(record.source), load_s=load_s))
    if generation.merged is not None:  # the only adapter, which was loaded and proved like any other
        lora = backend.new_lora()
        adapters = [_merge(adapters[0], bundle, base.placed, model)]
    blocks, limits = _memory(settings, generation, backend, model, lora, adapters)
    runner = _runner(backend, model, lora, blocks.num_blocks, blocks.block_size, limits)
    if backend.recordable:
        _record(runner, model.device)
    engine = Engine(runner, limits, blocks)
    _run_a_few_tokens(engine, adapters)  # so that the first request does not wait for what is made at first use
    seconds = time.monotonic() - started
    log.info(
        "loaded",
        deployment=generation.deployment,
        generation=generation.number,
        backend=lora.name,
        operations=backend.how,
        device=str(backend.device),
        dtype=str(backend.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        adapters=len(adapters),
        merged=generation.merged or "none",
        kv_tokens=blocks.num_blocks * blocks.block_size,
        max_seq_len=limits.max_seq_len,
        seconds=round(seconds, 2),
    )
    source = shown_source(generation.base.source)
    described = ServedModel(generation.served_model_name, source=source, load_s=base.load_s, warnings=warned)
    models = [described, *adapters]
    catalog = Catalog(generation.number, generation.served_model_name, models, seconds)
    thread = EngineThread(
        engine,
        settings.max_queue,
        partial(_run_a_few_tokens, engine, adapters),
        step_timeout_s=settings.step_timeout_s,
        interval_s=settings.sizes(model.device.type).interval_ms / 1e3,
    )
    ends = base.config.eos_token_ids
    serving = ServingLimits(limits.max_seq_len, generation.request_default_max_tokens, ends)
    service = GenerationService(catalog, base.text, thread, serving, watchers)
    service.apply(generation)  # its aliases and limits, and whether the base is served
    return Ready(service, thread)


@dataclass(frozen=True)
class _Base:
    """A base that was loaded."""

    placed: PlacedBase
    config: ModelConfig
    text: Text
    backend: Backend
    model: Decoder
    load_s: float


def _load_base(generation: Generation, settings: InferenceSettings, sources: Sources) -> _Base:
    """Load the base from its source, or from the cache, where what is damaged is fetched again."""
    into = settings.cache_dir / "checkpoints" / _cache_name(generation)

    def read(placed: PlacedBase) -> _Base:
        with placed.small_files() as folder:
            config = read_config(folder, generation.max_seq_len)
            text = Text.load(folder, config.dims.vocab)
        backend = choose_backend(settings, config)
        reading = time.monotonic()
        model = Decoder(config, _checkpoint(placed, backend.dtype, backend.device), backend.operations)
        return _Base(placed, config, text, backend, model, time.monotonic() - reading)

    log.info("fetching the base", source=shown_source(generation.base.source), cache=str(settings.cache_dir))
    try:
        return with_base(generation.base, into, sources, read)
    except ResourcesExhausted as fault:
        raise ResourcesExhausted(f"LORAMUX_CACHE_DIR={settings.cache_dir}: {fault.message}") from fault


def _checkpoint(placed: PlacedBase, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    return Checkpoint(placed.folder, dtype, device, placed.require)


def _warn_about(config: ModelConfig, model: Decoder) -> tuple[str, ...]:
    """Log what is odd about a base, and return the codes for the list of models."""
    if config.tied_embeddings == model.config.tied_embeddings:
        return ()
    entry = CODES["W_HEAD"]
    log.warning("base", code=entry.code, found=entry.meaning, fix=entry.cure)
    return (entry.code,)


def _run_a_few_tokens(engine: Engine, adapters: Sequence[ServedModel]) -> None:
    """Run what works as long as anything does: the base, and an adapter where there is one."""
    for adapter in [None, *(served.adapter for served in adapters[:1])]:
        engine.add(EngineSequence("warm-up", [0, 0], SamplingParams(max_tokens=2), adapter))
        while not engine.idle:
            engine.step()


def _generation(name: str, store: Store) -> Generation:
    generation = current_generation(store, name)
    if generation is None:
        known = listed(list_deployments(store))
        raise DeploymentNotFound(
            f"no deployment {name!r} in {store.uri}. There: {known}. Build it first: loramux build FILE."
        )
    return generation


def _cache_name(generation: Generation) -> str:
    """A folder per set of files: another revision never meets files of this one."""
    source = generation.base.source
    place, revision = (re.sub(r"[^\w.\-]", "_", text) for text in (source.shown, source.revision))
    return f"{place[-80:]}@{revision[:16] or 'none'}"


def _load_adapter(
    name: str, bundle: Bundle, lora: LoraBackend, model: Decoder, text: Text, block_size: int
) -> ServedModel:
    config = model.config
    weights = pack_adapter(matrices(bundle), config.groups, config.dims.num_layers, model.dtype, lora.home)
    manifest = bundle.manifest
    adapter = Adapter(bundle.digest, lora.load(weights))
    if manifest.proof is not None:
        replayed = replay(name, manifest.proof, manifest, adapter, lora, model, block_size)
        log.info("proof holds", adapter=name, effect=replayed.effect, logprob=replayed.logprob)
    return ServedModel(
        name,
        adapter,
        digest=bundle.digest,
        ranks=manifest.ranks,
        modules=manifest.modules,
        warnings=tuple(finding.code for finding in manifest.warnings),
        defaults=read_adapter_defaults(name, bundle.texts, text),
    )


def _merge(served: ServedModel, bundle: Bundle, placed: PlacedBase, model: Decoder) -> ServedModel:
    """Merge an adapter into the weights: it is now what the base was."""
    rows, config = matrices(bundle), model.config
    checkpoint = _checkpoint(placed, torch.float32, model.device)
    model.merge(
        checkpoint, pack_adapter(rows, config.groups, config.dims.num_layers, torch.float32, model.device)
    )
    return replace(served, adapter=None)


def _memory(
    settings: InferenceSettings,
    generation: Generation,
    backend: Backend,
    model: Decoder,
    lora: LoraBackend,
    adapters: Sequence[ServedModel],
) -> tuple[BlockManager, SchedulerLimits]:
    """Size the cache from what is free, and the longest sequence from the cache."""
    sizes, block_size = settings.sizes(model.device.type), settings.block_size

    def limits(longest: int) -> SchedulerLimits:
        return SchedulerLimits(sizes.tokens, sizes.seqs, settings.max_batch_adapters, longest)

    def measured(longest: int) -> Measured:
        of_step = limits(longest)
        batch = largest_step(of_step, [each.adapter for each in adapters if each.adapter], block_size)
        scratch = partial(_runner, backend, model, lora, SCRATCH_BLOCKS, block_size, of_step)
        return measure(scratch, batch, CudaMemory(model.device))

    plan = divide_memory(
        settings,
        generation.max_seq_len,
        model,
        lora.num_bytes,
        graphs=backend.recordable,
        measure=measured if model.device.type == "cuda" else None,
    )
    blocks = BlockManager(plan.num_blocks, block_size, prefix_cache=settings.prefix_cache)
    return blocks, limits(plan.max_seq_len)


def _runner(
    backend: Backend,
    model: Decoder,
    lora: LoraBackend,
    num_blocks: int,
    block_size: int,
    limits: SchedulerLimits,
) -> Runner:
    """Return a runner with a cache of its own; one that can replay steps has recorded none yet."""
    if backend.recordable:
        segmented = cast(SegmentedLora, lora)  # what `recordable` promises
        return GraphRunner(model, segmented, num_blocks, block_size, limits, CudaRecorder(model.device))
    return Runner(model, lora, num_blocks, block_size)


def _record(runner: Runner, device: torch.device) -> None:
    """Record the steps, and log what that took."""
    memory = CudaMemory(device)
    before = memory.settled()
    runner.capture()
    log.info("memory", item="recorded steps", gb=round((before - memory.settled()) / GB, 3))
