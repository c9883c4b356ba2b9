"""Encoders whose scores depend on the distances between positions: MPNet, DeBERTa-v2 and v3."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inference_service.engine.backends.base import Attention, LayerHeads, StepLora
from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.attention import Context
from inference_service.engine.models.encoder import Encoder, EncoderLayer, SequenceAttention, read_norm
from inference_service.engine.models.reader import Reader
from loramux_shared.bases.families.deberta import DisentangledConfig
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


class DistanceAttention(SequenceAttention):
    """Attention with the embeddings of all distances within the longest sequence of a step."""

    def __init__(self, contexts: Sequence[Context], table: Tensor, config: DisentangledConfig) -> None:
        """Take the embeddings [distances, hidden], from the most negative distance on."""
        super().__init__(contexts)
        lengths = [context.length for context in contexts]
        rows = span_of(torch.arange(max(lengths)), config)
        first = max(config.span - int(rows[-1]), 0)
        self.table = table[first : config.span + int(rows[-1]) + 1]
        rows = torch.cat([rows[:length] for length in lengths])
        sides = (config.span - rows).clamp(min=0), (config.span + rows).clamp(max=2 * config.span - 1)
        self.sides = tuple([(side - first).to(table.device) for side in sides])
        """Rows of the table [T] for the distances 0, -1, -2 ... of each sequence, and for 0, 1, 2 ..."""
        self.embeddings = tuple([self.table[side] for side in self.sides])
        """The same rows [T, hidden]."""


class DisentangledLayer(EncoderLayer):
    """A layer whose linears of queries and keys read embeddings of distances too, with the adapters of rows."""

    def _attend(
        self,
        ops: Operations,
        heads: Tensor,
        x: Tensor,  # noqa: ARG002 - the heads have what is needed of it
        attention: Attention,
        lora: StepLora | None,
    ) -> Tensor:
        """Return [T, hidden] of the heads [T, all heads, d] of x."""
        assert isinstance(attention, DistanceAttention)  # noqa: S101 - `DisentangledEncoder.attention` made it
        plain, found = ops.linear(self.qkv, attention.table), []
        for rows, embeddings in zip(attention.sides, attention.embeddings, strict=True):
            out = plain[rows]
            if lora is not None:
                lora.apply(embeddings, out, self._index, self._groups[0])
            found.append(out.view(heads.shape))
        before, behind = found
        scale = self._spec.scale

        def score_distances(span: slice, q: Tensor, k: Tensor) -> Tensor:
            """Return the scores [heads, length, length] of queries and keys with distances."""
            both = torch.cat([before[span].flip(0)[:-1], behind[span]])
            queries, keys, _ = both.transpose(0, 1).chunk(3)
            return scale * (_shift(q @ keys.flip(1).mT) + _shift(k @ queries.mT).mT)

        return attention.attend(heads, scale, score_distances)


class DisentangledEncoder(Encoder):
    """An encoder whose layers share embeddings of distances."""

    config: DisentangledConfig
    _layer = DisentangledLayer

    def _read(self, reader: Reader, config: EncoderConfig) -> None:
        """Read the embeddings of distances too."""
        assert isinstance(config, DisentangledConfig)  # noqa: S101 - `read_model` looked
        super()._read(reader, config)
        shape = 2 * config.span, config.dims.hidden
        table = reader.rounded(reader.get("encoder.rel_embeddings.weight", shape))
        self._distances = read_norm(reader, "encoder.LayerNorm")(table) if config.distance_norm else table

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:  # noqa: ARG002
        """Plan the attention of a step, which has all rows of its sequences."""
        return DistanceAttention(contexts, self._distances, self.config)


def span_of(distances: Tensor, config: DisentangledConfig) -> Tensor:
    """Return how far from the middle of the table the row for each distance of at least 0 is."""
    if config.buckets is None:
        return distances
    middle = config.buckets // 2
    most = torch.log(torch.tensor((config.farthest - 1) / middle))
    logs = torch.ceil(torch.log(distances.clamp(min=middle - 1) / middle) / most * (middle - 1)) + middle
    return torch.where(distances <= middle, distances, logs.long())


def _shift(x: Tensor) -> Tensor:
    """Return [heads, length, length] with column c of row r from column c - r + length - 1 of x."""
    heads, length, columns = x.shape
    strides = length * columns, columns - 1, 1
    return x.contiguous().as_strided((heads, length, length), strides, length - 1)
