"""From settings to a service that is ready: generation, base, adapters, engine."""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from dataclasses import dataclass

import psutil
import structlog
import torch

from inference_service.core.sequence import Adapter
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import Limits
from inference_service.lora.backend import LoraBackend
from inference_service.lora.loader import matrices
from inference_service.lora.torch_backend import TorchLora
from inference_service.lora.triton_backend import TritonLora
from inference_service.lora.weights import pack_adapter
from inference_service.models.config import ModelConfig
from inference_service.models.decoder import Decoder
from inference_service.models.read import read_config
from inference_service.serving.catalog import Catalog, ServedModel
from inference_service.serving.engine_thread import EngineThread
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
    model = Decoder(config, folder, dtype, device)
    lora = _backend(settings, model)
    adapters = [_load_adapter(name, generation, store, lora, model) for name in generation.adapters]
    blocks, limits = _memory(settings, generation, config, model)
    engine = Engine(Runner(model, lora, blocks.num_blocks, blocks.block_size), limits, blocks)
    log.info(
        "loaded",
        deployment=generation.deployment,
        generation=generation.number,
        backend=lora.name,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        adapters=len(adapters),
        kv_tokens=blocks.num_blocks * blocks.block_size,
        max_seq_len=limits.max_seq_len,
        seconds=round(time.monotonic() - started, 2),
    )
    catalog = Catalog(generation.number, ServedModel(generation.served_model_name), adapters)
    thread = EngineThread(engine, settings.max_queue)
    serving = ServingLimits(limits.max_seq_len, generation.request_default_max_tokens, config.eos_token_ids)
    text = Text.load(folder, config.dims.vocab)
    return Ready(GenerationService(catalog, text, thread, serving), thread)


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
) -> ServedModel:
    bundle = read_bundle(store, generation.adapters[name].digest)
    config = model.config
    weights = pack_adapter(matrices(bundle), config.groups, config.dims.num_layers, model.dtype, lora.home)
    manifest = bundle.manifest
    return ServedModel(
        name,
        Adapter(name, next(_uids), lora.load(weights)),
        digest=bundle.digest,
        ranks=manifest.ranks,
        modules=manifest.modules,
        warnings=tuple(finding.code for finding in manifest.warnings),
    )


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


def _backend(settings: InferenceSettings, model: Decoder) -> LoraBackend:
    if _uses_triton(settings, model.device):
        return TritonLora(model.config.groups, model.dtype, model.device)
    return TorchLora(model.config.groups, model.device)


def _uses_triton(settings: InferenceSettings, device: torch.device) -> bool:
    wanted = settings.backend == "triton" or (settings.backend == "auto" and device.type == "cuda")
    if wanted and importlib.util.find_spec("triton") is None:
        raise SettingsInvalid(
            "the triton backend needs Triton: pip install 'loramux[gpu]', or set LORAMUX_BACKEND=torch."
        )
    if wanted and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise SettingsInvalid("LORAMUX_BACKEND=triton needs a CUDA device. Set auto or torch.")
    return wanted
