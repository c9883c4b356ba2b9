"""From settings to a service that is ready: generation, base, adapters, engine."""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import structlog
import torch

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Adapter
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import Limits
from inference_service.kernels.cpu import build
from inference_service.kernels.cpu.ops import BLOCK, DTYPES, MAX_HEAD_DIM, CpuOps
from inference_service.lora.backend import LoraBackend
from inference_service.lora.loader import matrices
from inference_service.lora.native_backend import NativeLora
from inference_service.lora.torch_backend import TorchLora
from inference_service.lora.triton_backend import TritonLora
from inference_service.lora.weights import pack_adapter
from inference_service.models.config import ModelConfig
from inference_service.models.decoder import Decoder
from inference_service.models.read import read_config
from inference_service.serving.brought import read_brought
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.engine_thread import EngineThread
from inference_service.serving.proof import replay
from inference_service.serving.service import GenerationService, ServingLimits
from inference_service.serving.text import Text
from shared.bundle.deployments import current_generation, list_deployments
from shared.bundle.manifest import Generation
from shared.bundle.reader import read_bundle
from shared.faults import DeploymentNotFound, ResourcesExhausted, SettingsInvalid
from shared.settings import InferenceSettings
from shared.sources.checkpoint import fetch_base
from shared.sources.open import open_sources
from shared.storage.base import Store

log = structlog.get_logger()

# A uid is never used twice in a process; 0 is the base.
_uids = itertools.count(1)

# Without kv_memory_gb, the cache takes this part of what is free, and on a CPU no more than that many bytes.
KV_SHARE = {"cpu": 0.25, "cuda": 0.85}
MAX_CPU_KV_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Ready:
    """A loaded deployment."""

    service: GenerationService
    engine: EngineThread


def load(settings: InferenceSettings, store: Store) -> Ready:
    """Load the deployment's current generation; every byte is verified before it is used.

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
    generation = _generation(settings.deployment, store)
    sources = open_sources(
        local_roots=settings.local_roots,
        allowed_hosts=settings.allowed_hosts,
        secrets_dir=settings.secrets_dir,
        work_dir=settings.cache_dir,
    )
    folder = fetch_base(generation.base, settings.cache_dir / "checkpoints" / _cache_name(generation), sources)
    config = read_config(folder, generation.max_seq_len)
    device = _device(settings)
    dtype = _dtype(settings, config, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    ops, how = _native(settings, config, dtype) if device.type == "cpu" else (None, "torch operations")
    model = Decoder(config, folder, dtype, device, ops)
    lora = _backend(settings, model, ops)
    text = Text.load(folder, config.dims.vocab)
    adapters = [
        _load_adapter(name, generation, store, lora, model, text, settings.block_size)
        for name in generation.adapters
    ]
    if generation.merged is not None:
        lora = _backend(settings, model, ops)
        adapters = [_merge(served, folder, store, model) for served in adapters]
    blocks, limits = _memory(settings, generation, config, model)
    engine = Engine(Runner(model, lora, blocks.num_blocks, blocks.block_size), limits, blocks)
    _warm_up(engine, adapters)
    log.info(
        "loaded",
        deployment=generation.deployment,
        generation=generation.number,
        backend=lora.name,
        operations=how,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        adapters=len(adapters),
        merged=generation.merged or "none",
        kv_tokens=blocks.num_blocks * blocks.block_size,
        max_seq_len=limits.max_seq_len,
        seconds=round(time.monotonic() - started, 2),
    )
    base = [ServedModel(generation.served_model_name)] if generation.serve_base else []
    catalog = Catalog(generation.number, generation.served_model_name, [*base, *adapters])
    thread = EngineThread(engine, settings.max_queue, settings.stream_interval_ms / 1e3)
    serving = ServingLimits(limits.max_seq_len, generation.request_default_max_tokens, config.eos_token_ids)
    return Ready(GenerationService(catalog, text, thread, serving), thread)


def _warm_up(engine: Engine, adapters: Sequence[ServedModel]) -> None:
    """Run a few tokens, so that the first request does not wait for what is made at first use."""
    for adapter in [None, *(served.adapter for served in adapters[:1])]:
        engine.add(EngineSequence("warm-up", [0, 0], SamplingParams(max_tokens=2), adapter))
        while not engine.idle:
            engine.step()


def _generation(name: str, store: Store) -> Generation:
    generation = current_generation(store, name)
    if generation is None:
        known = ", ".join(list_deployments(store)[:20]) or "none"
        raise DeploymentNotFound(
            f"no deployment {name!r} in {store.uri}. There: {known}. Build it first: loramux build FILE."
        )
    return generation


def _cache_name(generation: Generation) -> str:
    """A folder per set of files: another revision never meets files of this one."""
    source = generation.base.source
    safe = "".join(char if char.isalnum() or char in "-_." else "_" for char in source.shown)[-80:]
    return f"{safe}@{source.revision[:16] or 'none'}"


def _device(settings: InferenceSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsInvalid("LORAMUX_DEVICE=cuda, but torch finds no CUDA device. Set auto or cpu.")
    cuda = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def _dtype(settings: InferenceSettings, config: ModelConfig, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
        assert isinstance(dtype, torch.dtype)  # noqa: S101 - the setting is one of four literals
        return dtype
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast and config.dtype == "bfloat16" else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.dtype, torch.float32)


def _load_adapter(
    name: str,
    generation: Generation,
    store: Store,
    lora: LoraBackend,
    model: Decoder,
    text: Text,
    block_size: int,
) -> ServedModel:
    bundle = read_bundle(store, generation.adapters[name].digest)
    config = model.config
    weights = pack_adapter(matrices(bundle), config.groups, config.dims.num_layers, model.dtype, lora.home)
    manifest = bundle.manifest
    adapter = Adapter(name, next(_uids), lora.load(weights))
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
        brought=read_brought(name, bundle.texts, text),
    )


def _merge(served: ServedModel, folder: Path, store: Store, model: Decoder) -> ServedModel:
    """Merge an adapter, which was loaded and proved before, into the weights: it is now what the base was."""
    rows, config = matrices(read_bundle(store, served.digest)), model.config
    model.merge(folder, pack_adapter(rows, config.groups, config.dims.num_layers, torch.float32, model.device))
    return replace(served, adapter=None)


def _memory(
    settings: InferenceSettings, generation: Generation, config: ModelConfig, model: Decoder
) -> tuple[BlockManager, Limits]:
    """Size the cache from what is free, and the longest sequence from the cache."""
    dims = config.dims
    token_bytes = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * model.dtype.itemsize
    wanted = min(generation.max_seq_len or config.max_positions, config.max_positions)
    if settings.kv_memory_gb:
        budget = settings.kv_memory_gb * 1e9
    elif model.device.type == "cuda":
        budget = KV_SHARE["cuda"] * torch.cuda.mem_get_info()[0]
    else:
        budget = min(KV_SHARE["cpu"] * psutil.virtual_memory().available, MAX_CPU_KV_BYTES)
    enough = settings.max_batch_seqs * wanted
    num_blocks = int(min(budget / token_bytes, enough)) // settings.block_size
    capacity = num_blocks * settings.block_size
    if capacity < min(wanted, 2 * settings.block_size) or (generation.max_seq_len and capacity < wanted):
        raise ResourcesExhausted(
            f"the key-value cache holds {capacity} tokens ({budget / 1e9:.2f} GB at {token_bytes} bytes a "
            f"token), and one sequence of max_seq_len={wanted} does not fit. "
            "Raise LORAMUX_KV_MEMORY_GB or lower max_seq_len."
        )
    blocks = BlockManager(num_blocks, settings.block_size, prefix_cache=settings.prefix_cache)
    limits = Limits(
        max_tokens=settings.max_batch_tokens,
        max_seqs=settings.max_batch_seqs,
        max_adapters=settings.max_batch_adapters,
        max_seq_len=min(wanted, capacity),
    )
    return blocks, limits


def _native(settings: InferenceSettings, config: ModelConfig, dtype: torch.dtype) -> tuple[CpuOps | None, str]:
    """Return the compiled operations, or None, and for the start line how that came."""
    if not settings.native or settings.backend != "auto":
        return None, "torch operations"
    if dtype not in DTYPES or settings.block_size % BLOCK or not 0 < config.dims.head_dim <= MAX_HEAD_DIM:
        return None, f"torch operations (compiled ones take {BLOCK} | block_size, float32 and bfloat16)"
    built = build.load(settings.cache_dir / "native")
    return (CpuOps(built.library, dtype) if built.library else None), built.how


def _backend(settings: InferenceSettings, model: Decoder, ops: CpuOps | None) -> LoraBackend:
    groups = model.config.groups
    if _uses_triton(settings, model.device):
        return TritonLora(groups, model.dtype, model.device)
    if ops is not None:
        return NativeLora(ops, groups, model.config.dims.num_layers)
    return TorchLora(groups, model.device)


def _uses_triton(settings: InferenceSettings, device: torch.device) -> bool:
    wanted = settings.backend == "triton" or (settings.backend == "auto" and device.type == "cuda")
    if wanted and importlib.util.find_spec("triton") is None:
        raise SettingsInvalid(
            "the triton backend needs Triton: pip install 'loramux[gpu]', or set LORAMUX_BACKEND=torch."
        )
    if wanted and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise SettingsInvalid("LORAMUX_BACKEND=triton needs a CUDA device. Set auto or torch.")
    return wanted
