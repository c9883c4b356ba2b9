"""A decoder over flat rows: no padding, no batch axis.

Rows of all sequences stand one after the other ([T, hidden]); attention knows from its plan which belong
together, and the adapters from theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, cast

import torch
from torch import Tensor

from inference_service.engine.backends.base import (
    Attention,
    LayerInputs,
    LayerOutputs,
    Recurrence,
    Rotation,
    StepLora,
    no_recurrence,
)
from inference_service.engine.backends.operations import Operations
from inference_service.engine.kernels.attention import Context
from inference_service.engine.kernels.blocks import WeightBlocks
from inference_service.engine.kernels.delta import StateChunk
from inference_service.engine.kernels.sampling import Drawn, RowParams
from inference_service.engine.layers.linear import Linear
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.layers.rope import Rope
from inference_service.engine.lora.vocabulary import StepVocabulary
from inference_service.engine.lora.weights import AdapterWeights
from inference_service.engine.models import family_blocks, mamba
from inference_service.engine.models.blocks import (
    AttentionBlock,
    Block,
    Blocks,
    Cache,
    CacheSize,
    DeltaBlock,
    InputBlock,
    Inputs,
    MixerBlock,
    Mlp,
    MlpBlock,
    Ranks,
    Step,
)
from inference_service.engine.models.checkpoint import Tensors
from inference_service.engine.models.experts import BesideBlock, ExpertsBlock
from inference_service.engine.models.reader import LayerReader, Reader, Table
from loramux_shared.bases.config import ModelConfig
from loramux_shared.bases.families import load_families
from loramux_shared.bases.layers import AttentionLayer, DeltaLayer, ExpertsLayer, MlpLayer
from loramux_shared.bases.rope import QueryScaling
from loramux_shared.bundle.manifest import ScoreHead
from loramux_shared.bundle.npy import Array
from loramux_shared.runtime import Rounding


@dataclass(frozen=True)
class Layer:
    """A mixer and what follows it, with norms before or behind them, or both."""

    input_norm: RMSNorm | None
    mixer: MixerBlock
    mixer_out_norm: RMSNorm | None
    mlp_norm: RMSNorm | None
    mlp: Mlp
    mlp_out_norm: RMSNorm | None
    inputs: InputBlock | None
    scalar: float | None
    """Factor of the hidden rows behind it."""


def read_layer(reader: LayerReader) -> Layer:
    """Read a layer.

    Raises:
        CheckpointInvalid: a tensor is missing, or has another shape than the config implies.
    """
    names, spec = reader.config.names, reader.config.layers[reader.index]
    norms_itself = isinstance(spec.mlp, ExpertsLayer) and spec.mlp.beside is not None
    scalar = None if names.scalar is None else float(reader.reader.rounded(reader.get(names.scalar, (1,))))
    return Layer(
        input_norm=reader.optional_norm(names.input_norm),
        mixer=_read_block(MIXERS, reader, spec.mixer),
        mixer_out_norm=reader.optional_norm(names.attention_out_norm),
        mlp_norm=None if norms_itself else reader.optional_norm(names.mlp_norm),
        mlp=_read_block(MLPS, reader, spec.mlp),
        mlp_out_norm=reader.optional_norm(names.mlp_out_norm),
        inputs=None if spec.inputs is None else InputBlock(reader),
        scalar=scalar,
    )


def _read_experts(reader: LayerReader, spec: ExpertsLayer) -> Mlp:
    return ExpertsBlock(reader, spec) if spec.beside is None else BesideBlock(reader, spec)


MIXERS: Final[Blocks[MixerBlock]] = {
    AttentionLayer: AttentionBlock,
    DeltaLayer: DeltaBlock,
    **family_blocks.MIXERS,
    **mamba.MIXERS,
}
MLPS: Final[Blocks[Mlp]] = {
    MlpLayer: lambda reader, _: MlpBlock.of_layer(reader),
    ExpertsLayer: _read_experts,
    **family_blocks.MLPS,
    **mamba.MLPS,
}


def _read_block(own: Blocks[Block], reader: LayerReader, spec: object) -> Block:
    """Read a block of ours, or one that the base's family brings."""
    if (read := own.get(type(spec))) is not None:
        return read(reader, spec)
    _, family = load_families()[reader.config.architecture]
    brought = {} if family.blocks is None else family.blocks()
    return cast(Block, brought[type(spec)](reader, spec))


class Decoder:
    """Turns token ids into logits."""

    score: tuple[ScoreHead, Array] | None = None
    """The score head that a base has itself, and its weights: of some encoders, and rerankers."""
    sparse: Callable[[Tensor], Tensor] | None = None
    """What makes the sparse vector [vocab] of hidden states [n, hidden]: of some encoders."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Tensors,
        operations: Operations | None = None,
        quantization: Rounding = Rounding.NONE,
        ranks: Ranks | None = None,
    ) -> None:
        """Load the weights of a checkpoint, to be run with the operations of the device, or else with torch's.

        Those of linears are rounded as quantization says; embeddings, norms, biases and adapters are not.
        Whether the head is tied is decided by the checkpoint, and `config` of this decoder says it. With ranks,
        it is the part of this one, and only the first one has embeddings and head. Raise CheckpointInvalid for
        a tensor that is missing or has another shape than config.json implies.
        """
        self.dtype, self.device = checkpoint.dtype, checkpoint.device
        self.rounding = quantization
        self._operations = operations or Operations(self.dtype, self.device)
        self.ranks, shard = ranks, None if ranks is None else ranks.shard
        config = config if shard is None else shard.config
        reader = Reader(
            checkpoint, config, self.dtype, self._operations, quantization=quantization, shard=shard
        )
        self._embedding, head = reader.tables()
        if shard is None or shard.is_first:
            self.score = _read_score(checkpoint, config, head)
        tied = config.tied_embeddings if head is None else head is self._embedding
        self.config = replace(config, tied_embeddings=tied, has_head=head is not None)
        self._stateful = config.state_bytes(1) > 0
        self.layers = [read_layer(reader.layer(index)) for index in range(config.dims.num_layers)]
        self._norm = reader.norm(config.names.final_norm)
        self._head = None
        if isinstance(head, WeightBlocks):
            self._head = self._operations.new_blocks([head])
        elif head is not None:
            self._head = self._operations.new_linear(head, quantization=quantization.of_head)
        self._head_bias = reader.head_bias() if config.head_bias else None
        self._inputs = None
        if config.inputs is not None and (shard is None or shard.is_first):
            self._inputs = Inputs(reader, config.inputs)
        self._ropes = tuple(Rope(spec, self.dtype, self.device) for spec in config.ropes)
        # Rounded as the weights are: Gemma was trained with a scale in bfloat16.
        self._scale = float(torch.tensor(config.embedding_scale, dtype=self.dtype))
        self._query_factors = _query_factors(config.query_scaling, config.max_positions).to(
            self.device, self.dtype
        )

    def merge(self, checkpoint: Tensors, adapter: AdapterWeights) -> None:
        """Add an adapter to the weights for good; the checkpoint, in float32, is the one that they came from.

        W + BA is summed in float32 and rounded once; ranks take parts of it. The old layers go first: a file of
        the checkpoint, which may be all of it, is in memory while it is read.
        """
        shard = None if self.ranks is None else self.ranks.shard
        reader = Reader(checkpoint, self.config, self.dtype, self._operations, adapter, shard=shard)
        self.layers.clear()
        for index in range(self.config.dims.num_layers):
            self.layers.append(read_layer(reader.layer(index)))

    def linears(self) -> Iterator[Linear]:
        """Yield the linears of all layers that every token passes through, in their order."""
        for block in chain.from_iterable((layer.mixer, layer.mlp) for layer in self.layers):
            yield from (part for part in vars(block).values() if isinstance(part, Linear))

    def new_cache(self, size: CacheSize) -> Cache:
        """Return an empty cache."""
        mixers = [layer.mixer for layer in self.layers]
        caches = tuple([mixer.new_cache(self._operations, size) for mixer in mixers])
        return Cache(caches, tuple([mixer.new_states(size) for mixer in mixers]))

    def attention(self, contexts: Sequence[Context], block_size: int) -> Attention:
        """Plan the attention of a step."""
        return self._operations.attention(contexts, block_size, self.config.windows)

    def recurrence(self, contexts: Sequence[Context]) -> Recurrence:
        """Plan how a step takes states of its sequences on."""
        chunks = [StateChunk.of(context) for context in contexts] if self._stateful else []
        return Recurrence(self._operations.recurrence(chunks), chunks) if chunks else no_recurrence

    @torch.inference_mode()
    def embed(self, tokens: Tensor, own: StepVocabulary | None = None) -> Tensor:
        """Return the embeddings [T, hidden] of tokens [T]; some rows may have an adapter's own."""
        known = tokens if own is None else own.known(tokens, self.config.dims.vocab)
        table = self._embedding
        if isinstance(table, WeightBlocks):
            known, table = torch.arange(len(known)), table.part(known).widened().to(self.dtype)
        hidden = self._operations.embed(known, table, self._scale)
        if own is not None:
            own.embed(tokens, hidden, self._scale, by_row=self._operations.by_row)
        return hidden

    @torch.inference_mode()
    def hidden(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: Tensor,
        last_rows: Tensor | None,
        attention: Attention,
        cache: Cache,
        lora: StepLora | None,
        recurrence: Recurrence = no_recurrence,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run tokens [T] at positions [T]; return what the head reads of some or all rows [N, hidden size].

        Their embeddings, hidden [T, hidden size], become the residual stream. The result is what transformers
        calls the last hidden state; it is in out, where that is given.
        """
        ops = self._operations
        if self.ranks is not None:
            self.ranks.share(hidden)
        rotations = tuple(attention.prepare_rotation(*ops.angles(rope, positions)) for rope in self._ropes)
        inputs = None if self._inputs is None else self._inputs(ops, tokens, hidden)
        if self.ranks is not None and (spec := self.config.inputs) is not None:
            if inputs is None:
                inputs = hidden.new_empty(len(hidden), len(self.layers), spec.width)
            self.ranks.share(inputs)
        factors = self._factors_at(positions)

        def run(hidden: Tensor, attention: Attention, rotations: tuple[Rotation, ...]) -> LayerOutputs:
            step = Step(ops, attention, cache, lora, rotations, factors, recurrence, self.ranks)
            return self._run_layers(step, hidden, inputs)

        if inputs is None and factors is None and not self._stateful:
            hidden, delta = ops.run_layers(run, LayerInputs(hidden, attention, rotations, lora, cache))
        else:
            hidden, delta = run(hidden, attention, rotations)
        delta_norm = None if delta is None else self._delta_norm
        if last_rows is not None:
            hidden, delta = hidden[last_rows], None if delta is None else delta[last_rows]
        return ops.norm(hidden, self._norm, delta, delta_norm, out)

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
        """Draw a token for each row of logits [N, vocab], on the host."""
        return self._operations.draw(logits, rows)

    @torch.inference_mode()
    def scores(self, logits: Tensor, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        """Score tokens ids [N] in rows of logits [N, vocab], as `kernels.sampling.scores` does."""
        return self._operations.scores(logits, ids, count)

    def logits(self, hidden: Tensor, own: StepVocabulary | None = None) -> Tensor:
        """Return the logits [N, vocab] of rows [N, hidden], some of which have a head of their own.

        Where one has more tokens than the base, there are columns for the most, and -inf where a row has none.
        Without a head there are no columns.
        """
        if self._head is None:
            return hidden.new_empty(len(hidden), 0)
        logits = self._operations.linear(self._head, hidden)
        if own is not None:
            logits = own.head(hidden, logits, by_row=self._operations.by_row)
        if self._head_bias is not None:
            logits[:, : self.config.dims.vocab] += self._head_bias
        if self.config.logit_divisor != 1.0:
            logits /= self.config.logit_divisor
        cap = self.config.logit_softcap
        logits = logits if cap is None else self._operations.softcap(logits, cap)
        if own is not None:
            own.bound(logits, self.config.dims.vocab)
        return logits

    def _run_layers(self, step: Step, hidden: Tensor, inputs: Tensor | None) -> LayerOutputs:
        """Run hidden [T, hidden size] through all layers, in place; what the last one adds is apart."""
        delta: Tensor | None = None
        delta_norm: RMSNorm | None = None
        for layer in self.layers:
            x = self._add(hidden, layer.input_norm, delta, delta_norm)
            delta = layer.mixer(step, x)
            if self.config.parallel:
                if layer.mlp_norm is not None:
                    x = self._add(hidden, layer.mlp_norm, None, None)
                delta = step.operations.add(delta, layer.mlp(step, x))
            else:
                x = self._add(hidden, layer.mlp_norm, self._scaled(delta), layer.mixer_out_norm)
                delta = layer.mlp(step, x)
            delta = self._scaled(delta)
            delta_norm = layer.mlp_out_norm
            if layer.inputs is not None and inputs is not None:
                x = self._add(hidden, None, delta, delta_norm)
                delta, delta_norm = layer.inputs(step, x, inputs), layer.inputs.out_norm
            if layer.scalar is not None:
                hidden = self._add(hidden, None, delta, delta_norm).mul_(layer.scalar)
                delta = delta_norm = None
        return hidden, delta

    @property
    def _delta_norm(self) -> RMSNorm | None:
        """The norm of what the last layer adds."""
        last = self.layers[-1]
        return last.mlp_out_norm if last.inputs is None else last.inputs.out_norm

    def _add(
        self, hidden: Tensor, norm: RMSNorm | None, delta: Tensor | None, delta_norm: RMSNorm | None
    ) -> Tensor:
        """Add delta to hidden in place; return what the next linear reads."""
        if norm is not None:
            return self._operations.norm(hidden, norm, delta, delta_norm)
        if delta is not None:
            if delta_norm is not None:
                delta = self._operations.norm(delta, delta_norm, None, None)
            self._operations.add(hidden, delta)
        return hidden

    def _scaled(self, delta: Tensor) -> Tensor:
        """Sum what ranks computed, and scale what is about to be added, in place."""
        if self.ranks is not None:
            self.ranks.sum(delta)
        scale = self.config.residual_scale
        return delta if scale == 1.0 else self._operations.scale(delta, scale)

    def _factors_at(self, positions: Tensor) -> Tensor | None:
        """Return the factors of queries at positions [T], [T, 1]; None: no scaling."""
        spec = self.config.query_scaling
        if spec is None:
            return None
        return self._query_factors.index_select(0, (positions + spec.ahead) // spec.length)[:, None]


def _read_score(checkpoint: Tensors, config: ModelConfig, head: Table | None) -> tuple[ScoreHead, Array] | None:
    """Read the base's own score head, or make it of rows of its head; None where it has none."""
    spec, hidden = config.logit_score, config.dims.hidden
    if config.labels:
        rows = checkpoint.get("score.weight", (len(config.labels), hidden), torch.float32)
        about: Any = {"id2label": config.labels, "problem_type": config.problem_type}
        return ScoreHead(num_labels=len(rows), hidden_size=hidden, **about), rows.cpu().numpy()
    if spec is None or head is None:
        return None
    tokens = torch.tensor([each for each in (spec.true_token, spec.false_token) if each is not None])
    rows = head.part(tokens).widened() if isinstance(head, WeightBlocks) else head[tokens.to(head.device)]
    rows = rows.float().cpu() / config.logit_divisor
    kind = "regression" if spec.raw else None
    score = ScoreHead(num_labels=1, hidden_size=hidden, problem_type=kind)
    return score, (rows[:1] - rows[1:].sum(0)).numpy()


def _query_factors(spec: QueryScaling | None, max_positions: int) -> Tensor:
    """Return what queries are multiplied with, by their position // length."""
    steps = 0 if spec is None else (max_positions - 1 + spec.ahead) // spec.length + 1
    return 1 + (0.0 if spec is None else spec.beta) * torch.log1p(torch.arange(steps).float())
