"""Encoders whose scores depend on the distances between positions: those of MPNet."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inference_service.engine.backends.base import Attention, LayerHeads
from inference_service.engine.kernels.attention import Context
from inference_service.engine.models.encoder import Encoder, SequenceAttention
from inference_service.engine.models.reader import Reader
from loramux_shared.bases.families.encoders import EncoderConfig
from loramux_shared.bases.families.mpnet import BiasedConfig


class BiasedAttention(SequenceAttention):
    """Attention whose scores have biases [heads, distances], of distances from the most negative one on."""

    def __init__(self, contexts: Sequence[Context], biases: Tensor) -> None:
        super().__init__(contexts)
        self._biases = biases
        self._of_lengths: dict[int, Tensor] = {}

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Return [T, heads * d]."""
        return self.attend(layer.heads, layer.spec.scale, self._bias)

    def _bias(self, span: slice, _q: Tensor, _k: Tensor) -> Tensor:
        """Return the biases [heads, length, length] of a sequence."""
        length, middle = span.stop - span.start, self._biases.shape[1] // 2
        if length not in self._of_lengths:
            near = self._biases[:, middle - length + 1 : middle + length]
            self._of_lengths[length] = near.unfold(1, length, 1).flip(1)
        return self._of_lengths[length]


class BiasedEncoder(Encoder):
    """An encoder whose layers share biases of distances."""

    config: BiasedConfig

    def _read(self, reader: Reader, config: EncoderConfig) -> None:
        """Read the biases too, and widen them to all distances."""
        assert isinstance(config, BiasedConfig)  # noqa: S101 - `read_model` looked
        super()._read(reader, config)
        shape = config.buckets, config.dims.num_heads
        table = reader.rounded(reader.get("encoder.relative_attention_bias.weight", shape))
        distances = torch.arange(1 - config.table_rows, config.table_rows)
        self._biases = table[bucket_of(distances, config).to(table.device)].t().contiguous()

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:  # noqa: ARG002
        """Plan the attention of a step, which has all rows of its sequences."""
        return BiasedAttention(contexts, self._biases)


def bucket_of(distances: Tensor, config: BiasedConfig) -> Tensor:
    """Return the row of the table for each distance from a row to what it sees: near ones have their own."""
    half = config.buckets // 2
    exact, far = half // 2, distances.abs()
    logs = torch.log(far.float() / exact) / math.log(config.farthest / exact) * (half - exact)
    shared = (exact + logs.to(torch.long)).clamp(max=half - 1)
    return torch.where(distances > 0, half, 0) + torch.where(far < exact, far, shared)
