"""Encoders as BERT is, but whose positions are in rotations of queries and keys: GTE, Nomic Embed, Jina v3."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inference_service.engine.backends.base import Attention, LayerHeads
from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.attention import Context
from inference_service.engine.layers.rope import Rope, rotate
from inference_service.engine.models.encoder import Encoder, EncoderLayer, SequenceAttention
from inference_service.engine.models.reader import LayerReader, Reader
from loramux_shared.bases.families.encoders import EncoderConfig
from loramux_shared.bases.layers import MlpLayer


class RotatedAttention(SequenceAttention):
    """Attention of rotated queries and keys."""

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Return [T, heads * d]."""
        turned = layer.heads.shape[1] // 3 * 2
        heads = torch.cat([rotate(layer.heads[:, :turned], *self.rotations[0]), layer.heads[:, turned:]], dim=1)
        return self.attend(heads, layer.spec.scale, self.near)


class RotatedLayer(EncoderLayer):
    """A layer whose MLP may be gated: its first half times the activation of the second."""

    def __init__(self, reader: LayerReader, config: EncoderConfig) -> None:
        """Read the weights."""
        super().__init__(reader, config)
        mlp = config.layers[reader.index].mlp
        self._gated = isinstance(mlp, MlpLayer) and mlp.gated

    def _activated(self, ops: Operations, x: Tensor) -> Tensor:
        if not self._gated:
            return super()._activated(ops, x)
        up, gate = x.chunk(2, dim=1)
        return super()._activated(ops, gate) * up


class RotatedEncoder(Encoder):
    """An encoder whose layers share a rotation."""

    _layer = RotatedLayer

    def _read(self, reader: Reader, config: EncoderConfig) -> None:
        """Read the layers, and what is before them."""
        super()._read(reader, config)
        self._ropes = tuple(Rope(spec, self.dtype, self.device) for spec in config.ropes)

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:  # noqa: ARG002
        """Plan the attention of a step, which has all rows of its sequences."""
        return RotatedAttention(contexts)

    @torch.inference_mode()
    def begin(self, tokens: Tensor, hidden: Tensor, positions: Tensor, attention: SequenceAttention) -> Tensor:
        """Return the rows [T, hidden] that the first layer reads, and compute the rotation of a step."""
        attention.rotations = [self._operations.angles(rope, positions) for rope in self._ropes]
        return super().begin(tokens, hidden, positions, attention)
