"""The base: fetched or found in the cache, read, and made into a model."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import structlog
import torch

from inference_service.adapters.served_model import ServedModel, display_source
from inference_service.backends.base import Backend
from inference_service.models.checkpoint import Checkpoint
from inference_service.models.decoder import Decoder
from inference_service.startup.choose import choose_backend
from inference_service.text.text import Text
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.formats.scheme import Quantization
from loramux_shared.bases.memory import GB, may_stay_packed, widening
from loramux_shared.bases.read import read_config
from loramux_shared.bundle.generation import Generation
from loramux_shared.codes import CODES
from loramux_shared.deployment import SourceKind
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.process import report
from loramux_shared.rounding import Rounding
from loramux_shared.runtime import Pooling, pooling_in
from loramux_shared.settings import InferenceSettings
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
    pooling: Pooling | None = Pooling.LAST
    """Pooling with which it was trained to make vectors; None: one that is not served."""

    def served(self, generation: Generation) -> ServedModel:
        """Return it as the catalog has it; what is odd about it is logged."""
        return ServedModel(
            generation.served_model_name,
            source=display_source(generation.base.source),
            load_s=self.load_s,
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
            text = Text.load(folder, config.dims.vocab)
            pooling = pooling_in(folder)
        backend = choose_backend(settings, config)
        dtype = str(backend.dtype).removeprefix("torch.")
        packed = backend.operations.keeps_integers and may_stay_packed(config)
        formats = widening(config, placed.record.weights_bytes, dtype, packed=packed)
        if formats and backend.quantization is Rounding.NONE:
            log.info("base has quantized weights", weights=formats)
        reading = time.monotonic()
        report(f"reading the base, {placed.record.weights_bytes / GB:.2f} GB")
        model = Decoder(
            config,
            checkpoint(placed, backend.dtype, backend.device, config.quantization),
            backend.operations,
            backend.quantization,
        )
        return LoadedBase(placed, config, text, backend, model, time.monotonic() - reading, pooling)

    if generation.base.source.source is not SourceKind.LOCAL:
        report("fetching the base, or finding it in the cache")
    log.info("fetching the base", source=display_source(generation.base.source), cache=str(settings.cache_dir))
    try:
        return with_base(generation.base, into, sources, read)
    except ResourcesExhausted as fault:
        raise ResourcesExhausted(f"LORAMUX_CACHE_DIR={settings.cache_dir}: {fault.message}") from fault


def checkpoint(
    placed: PlacedBase, dtype: torch.dtype, device: torch.device, quantization: Quantization | None
) -> Checkpoint:
    """Open the base's weights, once more."""
    return Checkpoint(placed.folder, dtype, device, placed.require, quantization)


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
