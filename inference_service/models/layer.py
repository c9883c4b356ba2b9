"""One layer of a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from inference_service.backends.base import Operations
from inference_service.layers.norm import RMSNorm
from inference_service.models.blocks.attention import AttentionBlock
from inference_service.models.blocks.delta import DeltaBlock
from inference_service.models.blocks.experts import BesideBlock, ExpertsBlock
from inference_service.models.blocks.inputs import InputBlock
from inference_service.models.blocks.mlp import MlpBlock
from inference_service.models.reader import LayerReader
from inference_service.models.step import CacheSize, LayerCache, Step
from loramux_shared.bases.layers import AttentionLayer, DeltaLayer, ExpertsLayer, MlpLayer


class Block(Protocol):
    """A part of a layer."""

    def __call__(self, step: Step, x: Tensor) -> Tensor:
        """Return what is added to the hidden rows [T, hidden], from them normed."""
        ...


class Mixer(Block, Protocol):
    """The part that mixes the rows of a sequence, and keeps what later rows need."""

    @property
    def stateful(self) -> bool:
        """Return True if it keeps a state of each sequence, in slots, instead of its tokens, in blocks."""
        ...

    def new_cache(self, operations: Operations, size: CacheSize) -> LayerCache:
        """Return an empty cache."""
        ...


@dataclass(frozen=True)
class Layer:
    """A mixer and what follows it, with norms before or behind them, or both."""

    input_norm: RMSNorm | None
    mixer: Mixer
    mixer_out_norm: RMSNorm | None
    mlp_norm: RMSNorm | None
    mlp: Block
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
        mixer=_read_mixer(reader, spec.mixer),
        mixer_out_norm=reader.optional_norm(names.attention_out_norm),
        mlp_norm=None if norms_itself else reader.optional_norm(names.mlp_norm),
        mlp=_read_mlp(reader, spec.mlp),
        mlp_out_norm=reader.optional_norm(names.mlp_out_norm),
        inputs=None if spec.inputs is None else InputBlock(reader),
        scalar=scalar,
    )


def _read_mixer(reader: LayerReader, spec: AttentionLayer | DeltaLayer) -> Mixer:
    return DeltaBlock(reader, spec) if isinstance(spec, DeltaLayer) else AttentionBlock(reader, spec)


def _read_mlp(reader: LayerReader, spec: MlpLayer | ExpertsLayer) -> Block:
    if isinstance(spec, MlpLayer):
        return MlpBlock.of_layer(reader)
    return ExpertsBlock(reader, spec) if spec.beside is None else BesideBlock(reader, spec)
