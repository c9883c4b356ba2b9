"""An encoder in plain torch over flat rows: sequences of all adapters in one forward pass, without padding.

Linears are those of the decoder, which a device multiplies and adapts as it does there. What is left are sums,
norms, an activation, and attention within each sequence.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, relu, scaled_dot_product_attention, silu

from inference_service.engine.backends.base import (
    Attention,
    LayerHeads,
    Recurrence,
    Rotation,
    StepLora,
    no_recurrence,
)
from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.attention import Context
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import LayerNorm, RMSNorm
from inference_service.engine.layers.rope import Rope, rotate
from inference_service.engine.lora.vocabulary import StepVocabulary
from inference_service.engine.models.blocks import Cache, CacheSize
from inference_service.engine.models.checkpoint import Tensors
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.models.reader import LayerReader, Reader
from loramux_shared.bases.families.encoders import EncoderConfig, ModernConfig
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array
from loramux_shared.runtime import Rounding

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": gelu,
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), partial(gelu, approximate="tanh")),
    "relu": relu,
    "silu": silu,
}


def read_norm(reader: Reader | LayerReader, name: str | None) -> LayerNorm:
    """Read a norm; old checkpoints call its weight gamma and its bias beta."""
    assert name is not None  # noqa: S101 - every family of encoders names its norms
    whole = reader if isinstance(reader, Reader) else reader.reader
    names = ("weight", "bias") if reader.has(f"{name}.weight") else ("gamma", "beta")
    shape = (whole.config.dims.hidden,)
    weight, bias = (whole.rounded(reader.get(f"{name}.{each}", shape)) for each in names)
    return LayerNorm(weight, whole.config.norm_eps, bias)


def read_score(checkpoint: Tensors, config: EncoderConfig) -> tuple[ScoreHead, Array]:
    """Read the base's own score head as those of adapters are kept: see `ScoreHead`."""
    layers, hidden, count = config.head(of_tokens=config.scores_tokens), config.dims.hidden, len(config.labels)
    parts = []
    for module, shape in (
        (layers.dense, (hidden, hidden)),
        (layers.norm, (hidden,)),
        (layers.labels, (count, hidden)),
    ):
        if not module:
            continue
        name = checkpoint.first([f"{prefix}{module}.weight" for prefix in config.names.prefixes])
        weight, bias = checkpoint.get(name, shape, torch.float32), torch.zeros(shape[0])
        if module in layers.biased:
            bias = checkpoint.get(f"{name.removesuffix('.weight')}.bias", shape[:1], torch.float32)
        if module == layers.norm:
            weight, bias = torch.stack([weight, bias.to(weight)]), torch.zeros(2)
        parts.append(torch.cat([weight, bias.to(weight)[:, None]], dim=1))
    about = {"problem_type": config.problem_type, "id2label": config.labels}
    head = layers.score_head(count, config).model_copy(update=about)
    return head, torch.cat(parts).cpu().numpy()


class VocabularyScores:
    """The head of masked language modelling, whose last layer has the rows of the embeddings."""

    def __init__(self, checkpoint: Tensors, config: EncoderConfig, words: Tensor) -> None:
        """Read it; words are the embeddings."""
        head = config.vocabulary_head
        assert head is not None  # noqa: S101 - `read_config` looked
        hidden, dtype = config.dims.hidden, words.dtype

        def vector(name: str, width: int = hidden) -> Tensor:
            return checkpoint.get(name, (width,)).to(dtype)

        biases = [
            None if name in head.without_bias else vector(f"{name}.bias") for name in (head.dense, head.norm)
        ]
        self._dense = Linear(checkpoint.get(f"{head.dense}.weight", (hidden, hidden)).to(dtype), biases[0])
        self._norm = LayerNorm(vector(f"{head.norm}.weight"), config.norm_eps, biases[1])
        self._words = Linear(words, vector(head.bias, config.dims.vocab))
        self._activation, self._logs = ACTIVATIONS[head.activation or config.hidden_act], config.sparse_logs

    def __call__(self, states: Tensor) -> Tensor:
        """Return the sparse vector [vocab] of hidden states [n, hidden], in which most numbers are 0."""
        best = states.new_zeros(self._words.out_features)
        for part in torch.split(states, max(1, SCORES_AT_ONCE // len(best))):
            scores = self._words(self._norm(self._activation(self._dense(part))))
            best = torch.maximum(best, scores.amax(0))
        for _ in range(self._logs):
            best = best.float().log1p()
        return best


SCORES_AT_ONCE: Final = 1 << 23
"""Scores of tokens of the vocabulary that are in memory at once."""

ScoreMask: TypeAlias = Callable[[slice, Tensor, Tensor], Tensor | None]
"""Takes the rows of a sequence, its queries and its keys [heads, length, d]; returns the mask of its attention,
boolean or added to the scores, [heads, length, length] or [length, length], or None for no mask."""


class SequenceAttention:
    """Attention of every row to all rows of its sequence."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        self.spans = [slice(context.row, context.row + context.length) for context in contexts]
        self.seconds = [context.second for context in contexts]
        """Positions from which on tokens are a second text's."""
        self.rotations: Sequence[Rotation] = ()
        """The rotations of queries and keys, where positions are in them."""
        self._seen: dict[tuple[int, int], Tensor] = {}

    def prepare_rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """Return both unchanged."""
        return cos, sin

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Return [T, heads * d]; embeddings have positions, and nothing is cached."""
        return self.attend(layer.heads, layer.spec.scale, self.near)

    def attend(self, heads: Tensor, scale: float, mask: ScoreMask) -> Tensor:
        """Return the same, with a mask for each sequence."""
        out = heads.new_empty(len(heads), heads.shape[1] // 3, heads.shape[2])
        for span in self.spans:
            q, k, v = heads[span].transpose(0, 1)[None].chunk(3, dim=1)
            masked = mask(span, q[0], k[0])
            out[span] = scaled_dot_product_attention(q, k, v, masked, scale=scale)[0].transpose(0, 1)
        return out.flatten(1)

    def near(self, span: slice, q: Tensor, _k: Tensor, reach: int | None = None) -> Tensor | None:
        """Return which positions of a sequence [length, length] each row sees, to each side; None: all."""
        length = span.stop - span.start
        if reach is None or length <= reach + 1:
            return None
        if (length, reach) not in self._seen:
            rows = torch.arange(length, device=q.device)
            self._seen[length, reach] = (rows[:, None] - rows).abs() <= reach
        return self._seen[length, reach]


PARTS: Final = 3
"""Parts of a layer, of about as many products each, between which another step may run."""
EVERY: Final = slice(None)
"""All layers."""


class Layer(Protocol):
    """One layer of an encoder."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return its linears, in the order of computation."""
        ...

    def __call__(
        self, ops: Operations, x: Tensor, attention: SequenceAttention, lora: StepLora | None, /
    ) -> Iterator[Tensor]:
        """Yield what each of its PARTS computes for x [T, hidden], the last of them [T, hidden]."""
        ...


class EncoderLayer:
    """Attention and an MLP, each added to its input and normed."""

    def __init__(self, reader: LayerReader, config: EncoderConfig) -> None:
        """Read the weights."""
        names, mixer = config.names, config.attentions[reader.index]
        self._index, self._spec, self._head_dim = reader.index, mixer.attention, mixer.head_dim
        modules = "attn_q", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h"
        self._groups = tuple(reader.group(module).name for module in modules)
        self.qkv = reader.linear("attn_q", names.qkv, bias=config.qkv_bias)
        self.o = reader.linear("attn_dense", (names.o,), bias=config.o_bias)
        self.up = reader.linear("mlp_h_to_4h", names.gate_up, bias=config.mlp_bias and config.up_bias)
        self.down = reader.linear("mlp_4h_to_h", (names.down,), bias=config.mlp_bias)
        self._attention_norm = read_norm(reader, names.attention_out_norm)
        self._norm = read_norm(reader, names.mlp_out_norm)
        self._activation = ACTIVATIONS[config.hidden_act]

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return its linears, in the order of computation."""
        return self.qkv, self.o, self.up, self.down

    def __call__(
        self, ops: Operations, x: Tensor, attention: Attention, lora: StepLora | None
    ) -> Iterator[Tensor]:
        """Yield what each of its PARTS computes for x [T, hidden], the last of them [T, hidden]."""
        qkv, o, up, down = self._groups
        heads = self._linear(ops, self.qkv, x, lora, qkv).view(len(x), -1, self._head_dim)
        attended = self._attend(ops, heads, x, attention, lora)
        x = self._attention_norm(self._linear(ops, self.o, attended, lora, o) + x)
        del heads, attended
        yield x
        wide = self._activated(ops, self._linear(ops, self.up, x, lora, up))
        yield wide
        yield self._norm(self._linear(ops, self.down, wide, lora, down) + x)

    def _attend(
        self,
        ops: Operations,  # noqa: ARG002 - layers that read more than heads compute it
        heads: Tensor,
        x: Tensor,
        attention: Attention,
        lora: StepLora | None,  # noqa: ARG002
    ) -> Tensor:
        """Return [T, hidden] of the heads [T, all heads, d] of x."""
        return attention(LayerHeads(heads, (x, x), x, x, self._spec))

    def _linear(self, ops: Operations, layer: Linear, x: Tensor, lora: StepLora | None, group: str) -> Tensor:
        return ops.linear(layer, x) if lora is None else ops.apply_with_lora(layer, x, lora, self._index, group)

    def _activated(self, ops: Operations, x: Tensor) -> Tensor:
        """Return an activation of rows [T, intermediate]; at once, its last few values may be others."""
        return torch.cat([*map(self._activation, torch.split(x, 1))]) if ops.by_row else self._activation(x)


class Encoder(Decoder):
    """Turns token ids into hidden states, as the engine's runner asks a decoder for them."""

    config: EncoderConfig
    _layer: Callable[[LayerReader, EncoderConfig], EncoderLayer] = EncoderLayer

    def __init__(
        self,
        config: EncoderConfig,
        checkpoint: Tensors,
        operations: Operations,
        quantization: Rounding = Rounding.NONE,
    ) -> None:
        """Load the weights of a checkpoint; those of linears are rounded as quantization says.

        Raises:
            CheckpointInvalid: a tensor is missing or has another shape than config.json implies.
        """
        self.config, self.ranks, self.rounding = config, None, quantization
        self.dtype, self.device = checkpoint.dtype, checkpoint.device
        self._operations = operations
        reader = Reader(checkpoint, config, self.dtype, operations, quantization=quantization)
        words = (config.dims.vocab, config.dims.hidden)
        self._words = reader.rounded(reader.get(f"{config.names.embedding}.weight", words))
        self._read(reader, config)
        self.score = read_score(checkpoint, config) if config.labels else None
        self.sparse = VocabularyScores(checkpoint, config, self._words) if config.sparse_logs else None

    def _read(self, reader: Reader, config: EncoderConfig) -> None:
        """Read the layers, and what is before and behind them."""

        def table(name: str, rows: int) -> Tensor:
            return reader.rounded(reader.get(f"embeddings.{name}.weight", (rows, config.dims.hidden)))

        self._positions = table("position_embeddings", config.table_rows) if config.table_rows else None
        self._types = table("token_type_embeddings", config.token_types) if config.token_types else None
        self._embeddings_norm: RMSNorm = read_norm(reader, config.embedding_norm)
        layers = map(reader.layer, range(config.dims.num_layers))
        self._layers: Sequence[Layer] = [self._layer(each, config) for each in layers]

    def linears(self) -> Iterator[Linear]:
        """Yield the linears of all layers, in their order."""
        for layer in self._layers:
            yield from layer.linears

    def new_cache(self, size: CacheSize) -> Cache:  # noqa: ARG002 - nothing is cached
        """Return an empty cache."""
        return Cache(())

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:  # noqa: ARG002
        """Plan the attention of a step, which has all rows of its sequences."""
        return SequenceAttention(contexts)

    def recurrence(self, contexts: Sequence[Context]) -> Recurrence:  # noqa: ARG002 - no layer carries a state
        """Return what no layer asks for."""
        return no_recurrence

    @torch.inference_mode()
    def embed(self, tokens: Tensor, own: StepVocabulary | None = None) -> Tensor:  # noqa: ARG002 - none has tokens
        """Return the embeddings [T, hidden] of tokens [T] alone."""
        return embedding(tokens, self._words)

    @torch.inference_mode()
    def hidden(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        last_rows: Tensor | None,
        attention: Attention,
        cache: Cache,  # noqa: ARG002 - nothing is cached
        lora: StepLora | None,
        recurrence: Recurrence = no_recurrence,  # noqa: ARG002
        out: Tensor | None = None,  # noqa: ARG002 - steps of encoders are not recorded
    ) -> Tensor:
        """Run tokens [T] at positions [T]; return the last hidden states of some or all rows [N, hidden]."""
        assert isinstance(attention, SequenceAttention)  # noqa: S101 - `attention` made it
        x = self.begin(tokens, hidden, positions, attention)
        x = deque(self.parts(x, attention, lora), maxlen=1).pop()
        return self.end(x if last_rows is None else x[last_rows])

    @torch.inference_mode()
    def begin(self, tokens: Tensor, hidden: Tensor, positions: Tensor, attention: SequenceAttention) -> Tensor:
        """Return the rows [T, hidden] that the first layer reads; hidden are the embeddings of tokens [T]."""
        if self._types is not None:
            types = torch.zeros_like(tokens)
            for span, second in zip(attention.spans, attention.seconds, strict=True):
                types[span.start + min(second, span.stop - span.start) : span.stop] = 1
            hidden = hidden + embedding(types, self._types)
        if self.config.padding is not None:
            positions = self._behind_padding(tokens, attention.spans, self.config.padding)
        if self._positions is not None:
            hidden = hidden + embedding(positions, self._positions)
        return self._embeddings_norm(hidden)

    @property
    def num_parts(self) -> int:
        """Return the parts of a step."""
        return PARTS * len(self._layers)

    @torch.inference_mode()
    def parts(
        self, x: Tensor, attention: SequenceAttention, lora: StepLora | None, layers: slice = EVERY
    ) -> Iterator[Tensor]:
        """Yield what each part of some layers computes of rows [T, hidden], last what the last one returns.

        Another step may run between two parts, if lora is told of this one again before the next.
        """
        for layer in self._layers[layers]:
            for x in layer(self._operations, x, attention, lora):  # noqa: B020 - the last is the next layer's
                yield x

    @torch.inference_mode()
    def end(self, x: Tensor) -> Tensor:
        """Return the last hidden states of rows [N, hidden] behind the last layer."""
        return x

    def logits(self, hidden: Tensor, own: StepVocabulary | None = None) -> Tensor:  # noqa: ARG002
        """Return no columns: an encoder draws no tokens."""
        return hidden.new_empty(len(hidden), 0)

    def _behind_padding(self, tokens: Tensor, spans: Sequence[slice], padding: int) -> Tensor:
        """Return RoBERTa's positions [T]: of the n-th token of a sequence that is no padding, n + padding."""
        real = (tokens != padding).long()
        return padding + torch.cat([real[span].cumsum(0) for span in spans]) * real


class ModernLayer:
    """Attention of rotated heads and a gated MLP, each of normed rows, and added to these."""

    def __init__(self, reader: LayerReader, config: ModernConfig) -> None:
        """Read the weights."""
        names, mixer = config.names, config.attentions[reader.index]
        self._index, self._heads, self._head_dim = reader.index, mixer.num_heads, mixer.head_dim
        self._scale, self._reach = mixer.attention.scale, config.reaches[reader.index]
        self._rope = config.ropes.index(mixer.rope)
        modules = "attn_q", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h"
        self._groups = tuple(reader.group(module).name for module in modules)
        places = zip(modules, (names.qkv, (names.o,), names.gate_up, (names.down,)), strict=True)
        biases = config.qkv_bias, config.o_bias, config.mlp_bias, config.mlp_bias
        self.linears = tuple(
            reader.linear(module, own, bias=bias) for (module, own), bias in zip(places, biases, strict=True)
        )
        self._attention_norm = None if reader.index == 0 else reader.optional_norm(names.input_norm)
        self._norm = reader.optional_norm(names.mlp_norm)

    def __call__(
        self,
        ops: Operations,
        x: Tensor,
        attention: SequenceAttention,
        lora: StepLora | None,
    ) -> Iterator[Tensor]:
        """Yield what each of its PARTS computes for x [T, hidden], the last of them [T, hidden]."""

        def linear(place: int, x: Tensor) -> Tensor:
            layer, group = self.linears[place], self._groups[place]
            if lora is None:
                return ops.linear(layer, x)
            return ops.apply_with_lora(layer, x, lora, self._index, group)

        normed = x if self._attention_norm is None else self._attention_norm(x)
        heads = linear(0, normed).view(len(x), -1, self._head_dim)
        rotated = rotate(heads[:, : 2 * self._heads], *attention.rotations[self._rope])
        heads = torch.cat([rotated, heads[:, 2 * self._heads :]], dim=1)
        x = x + linear(1, attention.attend(heads, self._scale, partial(attention.near, reach=self._reach)))
        del normed, heads, rotated
        yield x
        wide = linear(2, x if self._norm is None else self._norm(x))
        yield wide
        gate, up = wide.chunk(2, dim=1)
        rows = torch.split(gate, 1) if ops.by_row else (gate,)
        yield x + linear(3, torch.cat([gelu(row) for row in rows]) * up)


class ModernEncoder(Encoder):
    """An encoder whose positions are in rotations, and whose last hidden states are normed."""

    config: ModernConfig

    def _read(self, reader: Reader, config: EncoderConfig) -> None:
        """Read the layers, and the norms before and behind them."""
        assert isinstance(config, ModernConfig)  # noqa: S101 - `read_model` looked
        self._embeddings_norm = reader.norm("embeddings.norm")
        self._layers = [ModernLayer(reader.layer(index), config) for index in range(config.dims.num_layers)]
        self._norm = reader.norm(config.names.final_norm)
        self._ropes = tuple(Rope(spec, self.dtype, self.device) for spec in config.ropes)

    @torch.inference_mode()
    def begin(
        self,
        tokens: Tensor,  # noqa: ARG002 - their embeddings are there
        hidden: Tensor,
        positions: Tensor,
        attention: SequenceAttention,
    ) -> Tensor:
        """Return the rows [T, hidden] that the first layer reads, and compute the rotations of a step."""
        attention.rotations = [self._operations.angles(rope, positions) for rope in self._ropes]
        return self._embeddings_norm(hidden)

    @torch.inference_mode()
    def end(self, x: Tensor) -> Tensor:
        """Return the last hidden states of rows [N, hidden] behind the last layer."""
        return self._norm(x)
