"""The one adapter of a deployment that hides its base, as part of the weights."""

from __future__ import annotations

import time
from collections.abc import Sequence

import structlog
import torch

from inference_service.adapters.served_model import ServedModel, display_source, read_adapter_defaults
from inference_service.backends.base import LoraBackend
from inference_service.core.adapter import Adapter
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.places import taken_by
from inference_service.lora.weights import AdapterWeights, load_adapter
from inference_service.startup.base import LoadedBase, checkpoint
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import Bundle, read_bundle
from loramux_shared.extensions import need_extension
from loramux_shared.storage.base import Store

log = structlog.get_logger()


def merge(generation: Generation, base: LoadedBase, store: Store, block_size: int) -> ServedModel:
    """Prove the adapter beside the base, as any other, and merge it into the weights.

    Raises:
        BundleCorrupt: a digest differs.
        ProofFailed: it answers otherwise than its proof says.
        AdapterInvalid: it brings a chat template that cannot be parsed.
        StoreUnavailable: the store does not answer.
    """
    [(name, record)] = generation.adapters.items()
    began = time.monotonic()
    bundle = read_bundle(store, record.digest)
    _prove(name, bundle, base, block_size)
    config, model = base.model.config, base.model
    exact = load_adapter(bundle, config.layer_groups, torch.float32, model.device)
    tensors = checkpoint(base.placed, torch.float32, model.device, config.quantization)
    model.merge(tensors, exact)
    summary = bundle.manifest.summary
    return ServedModel(
        name,
        None,
        display_source(record.source),
        record.digest,
        summary.ranks,
        summary.modules,
        summary.warnings,
        summary.weights_bytes,
        read_adapter_defaults(name, bundle.texts, base.text),
        load_s=time.monotonic() - began,
        kinds=summary.kinds,
        replaced=tuple(summary.replaced.items()),
        licence=record.licence,
    )


def _prove(name: str, bundle: Bundle, base: LoadedBase, block_size: int) -> None:
    manifest, model = bundle.manifest, base.model
    if manifest.proof is None:
        return
    lora = base.backend.new_lora()
    config = model.config
    weights = load_adapter(bundle, config.layer_groups, model.dtype, lora.home)
    packed = lora.pack(weights)
    [slot] = hold_packed(lora, [packed], packed.max_rank)
    replay = need_extension("prove.replay", "a bundle with a proof").replay
    replayed = replay(name, manifest.proof, manifest, Adapter(bundle.digest, slot), lora, model, block_size)
    log.info("adapter passed its proof", adapter=name, effect=replayed.effect, logprob=replayed.logprob)


def hold(lora: LoraBackend, *weights: AdapterWeights) -> list[int]:
    """Open a bank that is just large enough for adapters, and bring them in; return their slots."""
    return hold_packed(lora, [lora.pack(each) for each in weights])


def hold_packed(lora: LoraBackend, packed: Sequence[PackedAdapter], max_rank: int = 1) -> list[int]:
    """The same of adapters that are packed; the bank is opened for their largest rank, or for max_rank."""
    num_bytes = sum(taken_by(each.num_bytes) for each in packed)
    lora.open(num_bytes, max([max_rank, *(each.max_rank for each in packed)]), len(packed))
    offset = 0
    for slot, each in enumerate(packed):
        lora.copy(each, offset)
        lora.enter(slot, offset, each)
        offset += taken_by(each.num_bytes)
    return list(range(len(packed)))
