"""The interfaces of what backends make for a step: its attention, its adapters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from inference_service.engine.kernels.delta import DeltaInputs, StateChunk
from inference_service.engine.kernels.experts import ByExpert
from inference_service.engine.kernels.sgmv import Update
from inference_service.engine.layers.norm import RMSNorm
from inference_service.engine.lora.packed import PackedAdapter
from inference_service.engine.lora.segments import Arrangement
from inference_service.engine.lora.slots import Slots
from inference_service.engine.lora.vocabulary import Vocabularies
from inference_service.engine.lora.weights import AdapterWeights
from loramux_shared.bases.rope import AttentionSpec
from loramux_shared.faults import InternalFault

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the step's rows, in the form that an `Attention` made them."""


Delta = Callable[[DeltaInputs], Tensor]
"""A function that advances the states of a gated delta rule behind a step's rows.

Returns [T, value heads * value dim].
"""


class Recurrence(NamedTuple):
    """The means by which layers advance the states of a step's sequences."""

    delta: Delta
    chunks: Sequence[StateChunk] = ()
    """The step's rows, for layers of extensions; none where a step is recorded."""


class LayerHeads(NamedTuple):
    """The heads of a layer in a step, and what attention does with them."""

    heads: Tensor
    """Queries, keys and values, side by side [T, all heads, d]; queries alone of a layer that reads another's
    keys and values."""
    rotation: Rotation
    keys: Tensor
    values: Tensor
    spec: AttentionSpec
    norm: RMSNorm | None = None
    """Norm of the first heads, as many as it has weights."""
    sinks: Tensor | None = None
    """float32 [query heads]: scores of what every row sees besides, and which has no value."""
    scales: Tensor | None = None
    """Scales of keys and values of 8 bits, of the same cache."""
    update: Update | None = None
    """The update of `Operations.apply_deferring_lora`, which is to be added to the heads."""


class Attention(Protocol):
    """The attention of one step, shared by all layers."""

    def prepare_rotation(self, cos: Tensor, sin: Tensor) -> Rotation:
        """Prepare cos and sin [T, 1, rotary] of `Rope.at`, once per step."""
        ...

    def __call__(self, layer: LayerHeads) -> Tensor:
        """Return [T, query heads * d]."""
        ...


def _unplanned(_inputs: DeltaInputs) -> Tensor:
    raise InternalFault("a layer carries a state, and the step has planned for none")


no_recurrence: Final = Recurrence(_unplanned)
"""That of a step without states."""


LayerOutputs: TypeAlias = tuple[Tensor, Tensor | None]
"""The hidden rows [T, hidden size], and what is to be added to them."""
Layers: TypeAlias = Callable[[Tensor, "Attention", "tuple[Rotation, ...]"], LayerOutputs]
"""All layers, which take hidden rows, attention, and the rotations of all ropes."""


class LayerInputs(NamedTuple):
    """The inputs of the layers of a step."""

    hidden: Tensor
    """[T, hidden size]; changed in place."""
    attention: Attention
    rotations: tuple[Rotation, ...]
    lora: StepLora | None
    cache: object
    """The cache of all layers, which distinguishes steps: it is compared by identity, and not used."""


class StepLora(ABC):
    """The adapters of a step: adds their part to the outputs of fused linears."""

    vocabularies: Vocabularies
    """Embeddings and heads that adapters in slots have of their own."""

    @abstractmethod
    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step, some with an adapter; raise InternalFault for a slot without one."""

    @abstractmethod
    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""

    def adapts_experts(self, layer: int) -> bool:  # noqa: ARG002 - as cheap to find out while applying
        """Return whether an adapter of the step may add to experts of a layer."""
        return True

    @abstractmethod
    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """Add to out [pairs, all slices] what the adapters make of x [pairs, in], by each place's expert."""


class LoraBackend(Slots, StepLora):
    """A bank of adapters: an arena of fixed size that never moves, and slots that say where each lies.

    Where an adapter goes and who leaves for it is decided elsewhere (`lora/places.py`). The engine's thread
    calls `open`, `enter`, `leave`, `begin` and `apply`; `pack` and `copy` run beside it.
    """

    name = ""
    """For the start line."""
    home = torch.device("cpu")
    """Device from which it takes matrices."""

    @abstractmethod
    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Return an adapter as it will lie in the arena, in the host's memory; on any thread."""

    @abstractmethod
    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Copy it to bytes of the arena that no slot in use has, and return when it is there; on any thread.

        Raises:
            InternalFault: it does not lie within the arena, or begins between two multiples of 64.
        """
