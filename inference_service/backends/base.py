"""The interface of backends for the model and the engine: operations, attention, adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from inference_service.backends.experts import Grouped
from inference_service.core.computing import Computing
from inference_service.kernels.attention import Context
from inference_service.kernels.delta import DeltaInputs
from inference_service.kernels.experts import ByExpert, Routed
from inference_service.kernels.rows import Activation
from inference_service.kernels.sampling import Drawn, RowParams
from inference_service.kernels.sgmv import Update
from inference_service.layers.linear import Linear
from inference_service.layers.norm import RMSNorm
from inference_service.layers.rope import Rope
from inference_service.lora.packed import PackedAdapter
from inference_service.lora.segments import Arrangement
from inference_service.lora.vocabulary import Vocabularies
from inference_service.lora.weights import AdapterWeights
from loramux_shared.bases.rope import AttentionSpec, HeadCounts
from loramux_shared.faults import InternalFault
from loramux_shared.runtime import Rounding

Turn = tuple[Tensor, Tensor]
"""cos and sin of the step's rows, in the form that an `Attention` made them."""


Recurrence = Callable[[DeltaInputs], Tensor]
"""A function that advances the states of a step's sequences in a layer that carries one.

Returns [T, value heads * value dim] of a gated delta rule, whose states are behind the step's rows then.
"""


class Attention(Protocol):
    """The attention of one step, shared by all layers."""

    def turn(self, cos: Tensor, sin: Tensor) -> Turn:
        """Prepare cos and sin [T, 1, rotary] of `Rope.at`, once per step."""
        ...

    def __call__(
        self,
        heads: Tensor,
        turn: Turn,
        keys: Tensor,
        values: Tensor,
        spec: AttentionSpec,
        norm: RMSNorm | None = None,
        sinks: Tensor | None = None,
        scales: Tensor | None = None,
        update: Update | None = None,
    ) -> Tensor:
        """Return [T, heads * d] of the heads of queries, keys and values, side by side [T, all heads, d].

        There are queries alone where the layer reads another's keys and values. The first heads, as many as
        the norm has weights, are normed first. Sinks, float32 [query heads], are scores of what every row sees
        besides, and which has no value. Scales are those of keys and values of 8 bits, of the same cache. An
        update is of `Operations.begun`, and is to be added to the heads.
        """
        ...


def no_recurrence(_inputs: DeltaInputs) -> Tensor:
    """Stand for what a step has no states for.

    Raises:
        InternalFault: a layer carries one.
    """
    raise InternalFault("a layer carries a state, and the step has planned for none")


LayerOutputs: TypeAlias = tuple[Tensor, Tensor | None]
"""The hidden rows [T, hidden size], and what is to be added to them."""
Layers: TypeAlias = Callable[[Tensor, "Attention", "tuple[Turn, ...]"], LayerOutputs]
"""All layers, which take hidden rows, attention, and the rotations of all ropes."""


class LayerInputs(NamedTuple):
    """The inputs of the layers of a step."""

    hidden: Tensor
    """[T, hidden size]; changed in place."""
    attention: Attention
    turns: tuple[Turn, ...]
    lora: StepLora | None
    cache: object
    """The cache of all layers, which distinguishes steps: it is compared by identity, and not used."""


class Operations(Protocol):
    """The operations of one kind of device; T rows of all sequences stand one after the other."""

    by_row: bool
    """True if a row's results depend on nothing but the row, to the last bit."""
    keeps_integers: bool
    """True if weights of 4 bits are multiplied as checkpoints keep them, instead of widened at load."""

    def new_linear(
        self, weight: Tensor, bias: Tensor | None = None, quantization: Rounding = Rounding.NONE
    ) -> Linear:
        """Return a linear of a weight [out, in], rounded to fewer bits, in the layout that is read fastest.

        It stays as it is where its sizes do not allow the rounding.
        """
        ...

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Return what a linear makes of x [T, in], [T, out]."""
        ...

    def adapted(self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str) -> Tensor:
        """Return [T, out] of a group of layer ``index``, with what adapters add to it."""
        ...

    def begun(
        self, layer: Linear, x: Tensor, lora: StepLora, index: int, group: str
    ) -> tuple[Tensor, Update | None]:
        """Return [T, out] as `adapted` does, or of the base alone, and what is to be added by what reads it."""
        ...

    def angles(self, rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `Rope.at` [T, 1, dim] for positions [T]."""
        ...

    def embed(self, tokens: Tensor, table: Tensor, scale: float) -> Tensor:
        """Return the rows [T, hidden] of a table by tokens [T], times a scale of the table's dtype."""
        ...

    def norm(
        self,
        hidden: Tensor,
        norm: RMSNorm,
        delta: Tensor | None,
        delta_norm: RMSNorm | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Add delta, normed itself where it has a norm, to hidden [T, dim] in place; return hidden normed.

        Where out [T, dim] is given, the result is in it.
        """
        ...

    def gated(self, gate_up: Tensor, activation: Activation, update: Update | None = None) -> Tensor:
        """Return activation(gate) * up [T, intermediate] of both side by side; an update is one of `begun`."""
        ...

    def softcap(self, logits: Tensor, cap: float) -> Tensor:
        """Return tanh(logits / cap) * cap, for which logits may be reused."""
        ...

    def new_grouped(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        quantization: Rounding = Rounding.NONE,
    ) -> Grouped:
        """Return a linear of each expert, of weights [out, in] and biases [out], rounded as those of others.

        Kernels that take all experts at once do not round them.
        """
        ...

    def route(self, logits: Tensor, top_k: int, *, renormalised: bool) -> Routed:
        """Return the experts with the largest logits [T, E], and their probabilities."""
        ...

    def by_expert(self, routed: Routed, num_experts: int) -> ByExpert:
        """Sort the pairs of a token and an expert."""
        ...

    def combine(self, y: Tensor, routed: Routed, pairs: ByExpert) -> Tensor:
        """Return the weighted sums [T, N] of each token's places of y [pairs, N]."""
        ...

    def clamped(self, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        """Return (up + 1) * gate * sigmoid(alpha * gate) [T, I] of both side by side, clamped before."""
        ...

    def add_gated(self, out: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """Add x [T, N] times the sigmoid of gate [T, 1] to out [T, N] in place, and return it."""
        ...

    def attention(
        self, contexts: Sequence[Context], block_size: int, windows: Sequence[int | None]
    ) -> Attention:
        """Plan the attention of a step, for groups of layers with these windows."""
        ...

    def gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Return x [T, N] times the sigmoid of gate [T, N]."""
        ...

    def recurrence(self, contexts: Sequence[Context]) -> Recurrence:
        """Plan how a step takes the states of its sequences on."""
        ...

    def run_layers(self, layers: Layers, inputs: LayerInputs) -> LayerOutputs:
        """Return what layers compute of a step; it is valid until the next call for the same cache.

        A device may replay what they did before for a step of the same shape, so layers must do the same
        operations with the same weights in every such step.
        """
        ...

    def draw(self, logits: Tensor, rows: Sequence[RowParams]) -> Drawn:
        """Draw a token for each row of logits [N, vocab], on the host."""
        ...

    def new_cache(self, num_rows: int, heads: HeadCounts) -> tuple[Tensor, ...]:
        """Return empty keys and values of one layer, for num_rows tokens, a multiple of the block size.

        A cache of 8 bits has their scales behind them.
        """
        ...


class StepLora(Protocol):
    """The adapters of a step: adds their part to the outputs of fused linears."""

    vocabularies: Vocabularies
    """Embeddings and heads that adapters in slots have of their own."""

    def begin(self, arrangement: Arrangement) -> None:
        """Prepare for the rows of a step, at least one of which has an adapter.

        Raises:
            InternalFault: a row is of a slot that holds no adapter.
        """
        ...

    def apply(self, x: Tensor, out: Tensor, layer: int, group: str) -> None:
        """Add to out [T, all slices] what the adapters make of x [T, in]; base rows are not touched."""
        ...

    def adapts_experts(self, layer: int) -> bool:
        """Return whether an adapter of the step may add to experts of a layer."""
        ...

    def apply_experts(self, x: Tensor, out: Tensor, layer: int, group: str, pairs: ByExpert) -> None:
        """The same of each place's expert: out [pairs, all slices] and x [pairs, in] are by place."""
        ...


class LoraBackend(StepLora, Protocol):
    """A bank of adapters: an arena of fixed size that never moves, and slots that say where each lies.

    Where an adapter goes and who leaves for it is decided elsewhere (`lora/places.py`). The engine's thread
    calls `open`, `enter`, `leave`, `begin` and `apply`; `pack` and `copy` run beside it.
    """

    name: str
    """For the start line."""
    home: torch.device
    """Device from which it takes matrices."""

    @property
    def num_bytes(self) -> int:
        """Memory of the device that computes: of the arena and the tables."""
        ...

    @property
    def num_slots(self) -> int:
        """Slots that were opened."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Return the table bytes of each slot, in use or not: many, where layers have experts."""
        ...

    def open(self, num_bytes: int, max_rank: int, num_slots: int, host_bytes: int = 0) -> None:
        """Make the arena and the slots, once; no adapter has a larger rank in any module.

        A GPU copies from host memory that is locked: what `pack` returns lies in host_bytes of it, where these
        suffice.

        Raises:
            InternalFault: it is open already.
        """
        ...

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Return an adapter as it will lie in the arena, in the host's memory; on any thread."""
        ...

    def copy(self, packed: PackedAdapter, offset: int) -> None:
        """Copy it to bytes of the arena that no slot in use has, and return when it is there; on any thread.

        Raises:
            InternalFault: it does not lie within the arena, or begins between two multiples of 64.
        """
        ...

    def enter(self, slot: int, offset: int, packed: PackedAdapter) -> None:
        """Give a slot to what was copied: steps that begin from now on find it there.

        Raises:
            InternalFault: there is no such slot, it is taken, the rank is above what was opened, or `copy`
                would have raised.
        """
        ...

    def leave(self, slot: int) -> None:
        """Empty a slot; a later reference to it gets an error or nothing, never another adapter.

        Raises:
            InternalFault: it holds no adapter.
        """
        ...


@dataclass(frozen=True)
class Backend:
    """The parts that run a model on a kind of device."""

    device: torch.device
    dtype: torch.dtype
    operations: Operations
    new_lora: Callable[[], LoraBackend]
    """Makes an empty home for adapters."""
    computing: Computing
    """Description of the device and the operations, for operators."""
    quantization: Rounding = Rounding.NONE
    """Rounding of the weights of linears."""
    cache_dtype: torch.dtype | None = None
    """The type of keys and values; None: that of all else."""
    recordable: bool = False
    """True if steps can be recorded and replayed.

    Launches follow from buffers that stay where they are, and `new_lora` makes a `SegmentedLora`.
    """
