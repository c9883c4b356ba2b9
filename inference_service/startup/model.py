"""The model of a base, or of a rank's part of it, read from its checkpoint."""

from typing import Final

import torch

from inference_service.engine.backends.operations import Backend
from inference_service.engine.models.blocks import Ranks
from inference_service.engine.models.checkpoint import Checkpoint
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.models.encoder import Encoder, ModernEncoder
from inference_service.engine.models.relative import BiasedEncoder, DisentangledEncoder
from inference_service.engine.models.rotated import RotatedEncoder
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families.deberta import DisentangledConfig
from loramux_shared.bases.families.encoders import EncoderConfig, ModernConfig
from loramux_shared.bases.families.mpnet import BiasedConfig
from loramux_shared.bases.families.rotated import RotatedConfig
from loramux_shared.bases.weight_format import Quantization
from loramux_shared.sources.checkpoint import PlacedBase

ENCODERS: Final[dict[type[EncoderConfig], type[Encoder]]] = {
    EncoderConfig: Encoder,
    ModernConfig: ModernEncoder,
    BiasedConfig: BiasedEncoder,
    DisentangledConfig: DisentangledEncoder,
    RotatedConfig: RotatedEncoder,
}


def read_model(
    placed: PlacedBase, config: ModelConfig, backend: Backend, ranks: Ranks | None = None
) -> Decoder:
    """Read the weights of a base, or the part of a rank. Raise CheckpointInvalid for one that cannot be served,
    and BundleCorrupt for another file than was recorded.
    """
    tensors = checkpoint(placed, backend.dtype, backend.device, config.quantization)
    if isinstance(config, EncoderConfig):
        read: Decoder = ENCODERS[type(config)](config, tensors, backend.operations, backend.quantization)
    else:
        read = Decoder(config, tensors, backend.operations, backend.quantization, ranks)
    if ranks is None or ranks.shard.is_first:  # which reads all
        tensors.require_used(config)
    return read


def checkpoint(
    placed: PlacedBase, dtype: torch.dtype, device: torch.device, quantization: Quantization | None
) -> Checkpoint:
    """Open the base's weights, once more."""
    return Checkpoint(placed.folder, dtype, device, placed.require, quantization)
