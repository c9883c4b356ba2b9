"""The one adapter of a deployment that hides its base, as part of the weights."""

from __future__ import annotations

import time

import torch

from inference_service.adapters.loader import Packer
from inference_service.adapters.served_model import ServedModel, display_source, read_adapter_defaults
from inference_service.backends.base import LoraBackend
from inference_service.lora.places import taken_by
from inference_service.lora.weights import AdapterWeights, load_adapter
from inference_service.startup.base import LoadedBase, checkpoint
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import read_bundle
from loramux_shared.storage.base import Store


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
    config, model = base.model.config, base.model
    if bundle.manifest.proof is not None:
        lora = base.backend.new_lora()
        packed = lora.pack(load_adapter(bundle, config.layer_groups, model.dtype, lora.home))
        Packer(model, lora, base.backend.new_lora, block_size).prove(bundle, packed, name)
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


def hold(lora: LoraBackend, *weights: AdapterWeights) -> list[int]:
    """Open a bank that is just large enough for adapters, and bring them in; return their slots."""
    packed = [lora.pack(each) for each in weights]
    num_bytes = sum(taken_by(each.num_bytes) for each in packed)
    lora.open(num_bytes, max([1, *(each.max_rank for each in packed)]), len(packed))
    offset = 0
    for slot, each in enumerate(packed):
        lora.copy(each, offset)
        lora.enter(slot, offset, each)
        offset += taken_by(each.num_bytes)
    return list(range(len(packed)))
