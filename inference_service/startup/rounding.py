"""The rounding of the weights of a replica's base."""

from __future__ import annotations

import structlog

from inference_service.startup.base import LoadedBase
from loramux_shared.bases.memory import GB, may_stay_packed, weights_bytes
from loramux_shared.bundle.generation import Generation
from loramux_shared.deployment import Merge
from loramux_shared.faults import SettingsInvalid
from loramux_shared.rounding import Rounding
from loramux_shared.settings import InferenceSettings

log = structlog.get_logger()


def agree(settings: InferenceSettings, generation: Generation) -> tuple[InferenceSettings, Generation]:
    """Return the settings with what weights are rounded to, and the generation: those take in no adapter.

    Raises:
        SettingsInvalid: the deployment asks for that.
    """
    quantization = settings.quantization or generation.quantization
    settings = settings.model_copy(update={"quantization": quantization})
    if quantization is Rounding.NONE or generation.merged is None:
        return settings, generation
    if generation.merge is Merge.ALWAYS:
        raise SettingsInvalid(
            f"LORAMUX_QUANTIZATION={quantization}, but runtime.merge of the deployment is always, and a merged "
            "adapter would be rounded with the weights. Set none, or build it with merge: auto."
        )
    log.info(
        "adapter is not merged: the weights are quantized", weights=quantization, adapter=generation.merged
    )
    return settings, generation.model_copy(update={"merge": Merge.NEVER})


def describe_weights(base: LoadedBase) -> str:
    """Return what the matrices of the base take, and would take."""
    backend, config = base.backend, base.model.config
    rounded, whole = (
        weights_bytes(config, backend.dtype.itemsize, backend.device.type, kind) / GB
        for kind in (backend.quantization, Rounding.NONE)
    )
    dtype = str(backend.dtype).removeprefix("torch.")
    if backend.quantization is Rounding.NONE:
        stays = backend.operations.keeps_integers and may_stay_packed(config)
        if not stays or config.quantization is None:
            saved = sum(linear.saved_bytes for linear in base.model.linears()) / GB
            return f"{dtype} in 12 bits: {whole - saved:.2f} GB" if saved else f"{dtype}: {whole:.2f} GB"
        size, device = backend.dtype.itemsize, backend.device.type
        packed = weights_bytes(config, size, device, Rounding.NONE, packed=True) / GB
        return f"{config.quantization.label}: {packed:.2f} GB ({dtype}: {whole:.2f} GB)"
    return f"{backend.quantization}: {rounded:.2f} GB ({dtype}: {whole:.2f} GB)"
