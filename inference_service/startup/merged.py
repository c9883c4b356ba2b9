"""The one adapter of a deployment that hides its base, as part of the weights."""

import time

import torch

from inference_service.adapters.loader import Packer
from inference_service.core.served_model import ServedModel, display_source, read_adapter_defaults
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.lora.places import taken_by
from inference_service.engine.lora.weights import AdapterWeights, load_adapter
from inference_service.engine.models.decoder import Decoder
from inference_service.startup.base import LoadedBase
from inference_service.startup.model import checkpoint
from loramux_shared.bundle.generation import Generation
from loramux_shared.bundle.reader import Bundle, read_bundle
from loramux_shared.sources.checkpoint import PlacedBase
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
    new_lora = base.backend.new_lora
    if bundle.manifest.proof is not None:
        Packer(base.model, new_lora(), new_lora, block_size)(bundle, name)
    others = None if base.host is None else base.host.ask("merge", record.digest)
    merge_into(base.model, base.placed, bundle)
    if others is not None:
        others()
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


def merge_into(model: Decoder, placed: PlacedBase, bundle: Bundle) -> None:
    """Merge an adapter into the weights of a base, or of a rank's part of it."""
    config = model.config if model.ranks is None else model.ranks.shard.whole
    exact = load_adapter(bundle, config.layer_groups, torch.float32, model.device)
    model.merge(checkpoint(placed, torch.float32, model.device, config.quantization), exact)


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
