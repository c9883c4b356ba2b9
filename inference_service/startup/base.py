"""The base: fetched or found in the cache, read, made into a model, rounded; and how fast it is read."""

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog
import torch

from inference_service.adapters.reading import BundleReader
from inference_service.adapters.texts import AdapterTexts, Scorer
from inference_service.core.computing import Computing
from inference_service.core.served_model import ServedModel, display_source
from inference_service.engine.backends.operations import Backend
from inference_service.engine.layers.linear import Linear
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.models.packed import named
from inference_service.engine.scheduling.lookup import Lookup
from inference_service.startup.choose import choose_backend
from inference_service.startup.model import read_model
from inference_service.startup.ranks.start import ReplicaRanks, read_with_ranks
from inference_service.text.text import Text
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.files import gguf_files
from loramux_shared.bases.memory import GB, may_stay_packed, token_bytes, weights_bytes, widening
from loramux_shared.bases.read import read_config
from loramux_shared.bases.shard import Shard
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.kinds import AdapterKind
from loramux_shared.codes import CODES
from loramux_shared.cores import cores_of, usable_cpus
from loramux_shared.deployment import Merge, SourceKind
from loramux_shared.faults import ResourcesExhausted, SettingsInvalid
from loramux_shared.process import report
from loramux_shared.runtime import Pooling, Rounding, pooling_in, prompts_in
from loramux_shared.settings import InferenceSettings, variable
from loramux_shared.sources.checkpoint import PlacedBase, with_base
from loramux_shared.sources.open import Sources

log = structlog.get_logger()


@dataclass(frozen=True)
class LoadedBase:
    """A base that was loaded."""

    placed: PlacedBase
    config: ModelConfig
    text: Text
    backend: Backend
    model: Decoder
    load_s: float
    host: ReplicaRanks | None = None
    """The other ranks that compute it, where there are some."""
    pooling: Pooling | None = Pooling.LAST
    """Pooling with which it was trained to make vectors; None: one that is not served."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Texts that it was trained to read in front of others, by name."""
    lookup: Lookup | None = None
    """Prompt lookup and a draft model, where the deployment has one."""

    def texts(self, reader: BundleReader) -> AdapterTexts:
        """Return what reads the texts and score heads of adapters, beside its own head."""
        of_base = None if self.model.score is None else Scorer(*self.model.score)
        return AdapterTexts(reader, self.text, of_base)

    def served(self, generation: Generation) -> ServedModel:
        """Return it as the catalog has it; what is odd about it is logged."""
        return ServedModel(
            generation.served_model_name,
            source=display_source(generation.base.source),
            load_s=self.load_s,
            kinds=() if self.config.generates else (AdapterKind.ENCODER.value,),
            num_labels=None if self.model.score is None else self.model.score[0].num_labels,
            warnings=_warn_about(self.config, self.model),
        )


def load_base(generation: Generation, settings: InferenceSettings, sources: Sources) -> LoadedBase:
    """Load the base from its source, or from the cache, where what is damaged is fetched again.

    Raises:
        CheckpointInvalid: the base cannot be served.
        ResourcesExhausted: the cache's disk is full.
        Fault: what the base's source raises.
    """
    into = settings.cache_dir / "checkpoints" / _cache_name(generation)

    def read(placed: PlacedBase) -> LoadedBase:
        with placed.small_files() as folder:
            config = read_config(folder, generation.max_seq_len)
            judged = config.logit_score
            text = Text.load(folder, config.dims.vocab, None if judged is None else judged.instruction)
            pooling, prompts = pooling_in(folder, encodes=config.encodes), prompts_in(folder)
        shard = shard_of(settings, config, 0)
        backend = choose_backend(settings, config if shard is None else shard.config)
        if not config.generates or not all(layer.mixer.recorded for layer in config.layers):
            backend = replace(backend, recordable=False)
        dtype = named(backend.dtype)
        packed = may_stay_packed(config, backend.operations.keeps)
        formats = widening(config, placed.record.weights_bytes, dtype, packed=packed)
        if formats and backend.quantization is Rounding.NONE:
            log.info("base has quantized weights", weights=formats)
        reading = time.monotonic()
        report(f"reading the base, {placed.record.weights_bytes / GB:.2f} GB")
        if shard is None:
            host, model = None, read_model(placed, config, backend)
        else:
            host, model = read_with_ranks(placed, shard, backend, settings, generation)
            config = shard.config
        config = replace(config, has_head=model.config.has_head)
        load_s = time.monotonic() - reading
        return LoadedBase(placed, config, text, backend, model, load_s, host, pooling, prompts)

    if generation.base.source.source is not SourceKind.LOCAL:
        report("fetching the base, or finding it in the cache")
    log.info("fetching the base", source=display_source(generation.base.source), cache=str(settings.cache_dir))
    try:
        return with_base(generation.base, into, sources, read)
    except ResourcesExhausted as fault:
        raise ResourcesExhausted(f"LORAMUX_CACHE_DIR={settings.cache_dir}: {fault.message}") from fault


def shard_of(settings: InferenceSettings, config: ModelConfig, rank: int) -> Shard | None:
    """Return what a rank has of a base, None where one process computes all of it; raise SettingsInvalid for a
    base that cannot be divided so.
    """
    world = settings.tensor_parallel or 1
    return None if world == 1 else Shard(config, rank, world, config.shard(world))


OPENMP_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
)
"""Variables that decide on torch's threads; binding also hides cores from the thread that is bound."""


def set_threads(settings: InferenceSettings, root: Path = Path("/")) -> str:
    """Have a thread compute on each core, or as many as settings or OpenMP's variables say; return why so many.

    Ranks divide the cores. root is as in `cores_of`.
    """
    ranks = settings.tensor_parallel or 1
    if settings.threads:
        count, why = settings.threads, variable("threads")
    elif named := next((name for name in OPENMP_VARIABLES if name in os.environ), None):
        count, why = torch.get_num_threads() // ranks, f"{named}={os.environ[named]}"
    else:
        cores = cores_of(usable_cpus(), root)
        count, why = cores.count // ranks, cores.why
    if max(1, count) != torch.get_num_threads():
        torch.set_num_threads(max(1, count))
    return why if ranks == 1 else f"{why}, of {ranks} ranks"


def _warn_about(config: ModelConfig, model: Decoder) -> tuple[str, ...]:
    """Log what is odd about a base, and return the codes for the list of models."""
    if config.tied_embeddings == model.config.tied_embeddings:
        return ()
    entry = CODES["W_HEAD"]
    log.warning("base", code=entry.code, found=entry.meaning, fix=entry.cure)
    return (entry.code,)


def _cache_name(generation: Generation) -> str:
    """A folder per set of files: another revision never meets files of this one."""
    source = generation.base.source
    place, revision = (re.sub(r"[^\w.\-]", "_", text) for text in (source.label, source.revision))
    return f"{place[-80:]}@{revision[:16] or 'none'}"


def agree(settings: InferenceSettings, generation: Generation) -> tuple[InferenceSettings, Generation]:
    """Return the settings with what weights are rounded to and how many ranks compute, and the generation.

    Rounded weights take in no adapter; blocks do where the deployment says always. Raise SettingsInvalid where
    the deployment asks for that.
    """
    quantization = settings.quantization or generation.quantization
    ranks = settings.tensor_parallel or generation.tensor_parallel_count
    settings = settings.model_copy(update={"quantization": quantization, "tensor_parallel": ranks})
    blocks = bool(gguf_files(generation.base.files))
    stays = quantization is Rounding.NONE and not blocks
    if stays or generation.merged is None or (blocks and generation.merge is Merge.ALWAYS):
        return settings, generation
    if generation.merge is Merge.ALWAYS:
        raise SettingsInvalid(
            f"LORAMUX_QUANTIZATION={quantization}, but runtime.merge of the deployment is always, and a merged "
            "adapter would be rounded with the weights. Set none, or build it with merge: auto."
        )
    log.info("adapter is not merged", weights=quantization, adapter=generation.merged)
    return settings, generation.model_copy(update={"merge": Merge.NEVER})


def describe_weights(base: LoadedBase) -> str:
    """Return what the matrices of the base take, and would take."""
    backend, config = base.backend, base.model.config
    rounded, whole = (
        weights_bytes(config, backend.dtype.itemsize, backend.device.type, kind) / GB
        for kind in (backend.quantization, Rounding.NONE)
    )
    dtype = named(backend.dtype)
    if backend.quantization is Rounding.NONE:
        stays = may_stay_packed(config, backend.operations.keeps)
        if not stays or config.quantization is None:
            saved = sum(linear.saved_bytes for linear in base.model.linears()) / GB
            return f"{dtype} in 12 bits: {whole - saved:.2f} GB" if saved else f"{dtype}: {whole:.2f} GB"
        size, device = backend.dtype.itemsize, backend.device.type
        packed = weights_bytes(config, size, device, Rounding.NONE, packed=True) / GB
        return f"{config.quantization.label}: {packed:.2f} GB ({dtype}: {whole:.2f} GB)"
    return f"{backend.quantization}: {rounded:.2f} GB ({dtype}: {whole:.2f} GB)"


BOUND_S: Final = 0.05
"""A start waits no longer for it, but for the product that is running then."""
WINDOW_S: Final = 0.0004
"""Seconds of reading, for one speed: shorter than others take a core away for, so that few have such a gap."""

LEAST: Final = 1e9
"""Bytes a second that every machine reads: a lower speed says that other work held the cores all the time."""


def reading_of(backend: Backend, config: ModelConfig, linears: Iterable[Linear]) -> Computing:
    """Return what computes, with what a token takes at least; linears stand for all that it passes through."""
    every = list(linears)
    counted = sum(_counted(backend, linear) for linear in every)
    reads = token_bytes(config, backend.dtype.itemsize, backend.quantization)
    reads -= reads * sum(linear.saved_bytes for linear in every) // max(1, counted)
    return replace(backend.computing, token_bytes=reads, bytes_per_s=bytes_per_s(backend, every))


def bytes_per_s(backend: Backend, linears: Iterable[Linear]) -> float:
    """Return how many bytes of weights products with one row read in a second: the best tenth of many windows.

    Other work on the cores makes windows slower, by a hundred times where it holds one of two threads up.

    The linears are those of a model, in their order and each once, so that no cache has them. The first one
    wakes threads up and is not measured; 0 where there is no other, or where all were too slow to be true.
    """
    speeds: list[float] = []
    spent, read, ends = 0.0, 0, 0.0
    for index, linear in enumerate(linears):
        x = torch.ones(1, linear.in_features, dtype=backend.dtype, device=backend.device)
        began = time.perf_counter()
        backend.operations.linear(linear, x)
        now = time.perf_counter()
        if not index:
            ends = now + BOUND_S
            continue
        spent += now - began
        read += _counted(backend, linear) - linear.saved_bytes
        if spent > WINDOW_S:
            speeds.append(read / spent)
            spent, read = 0.0, 0
        if now > ends:
            break
    best = sorted(speeds)[len(speeds) * 9 // 10] if speeds else read / spent if spent else 0.0
    return best if best >= LEAST else 0.0


def _counted(backend: Backend, linear: Linear) -> int:
    count = linear.in_features * linear.out_features
    return backend.quantization.weight_bytes(count, backend.dtype.itemsize)
