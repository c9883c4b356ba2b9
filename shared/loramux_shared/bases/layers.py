"""The parts of decoder layers. Layers of one decoder may differ in all of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loramux_shared.bases.groups import (
    GroupShape,
    attention_groups,
    delta_groups,
    expert_groups,
    input_groups,
    mlp_groups,
    shared_groups,
)
from loramux_shared.bases.rope import AttentionSpec, HeadCounts, RopeSpec


class CannotShard(ValueError):
    """A part of a decoder cannot be divided among ranks; the message says which."""


def divided(count: int, world: int, what: str) -> int:
    """Return the part of one rank; raise CannotShard where the ranks would have different parts."""
    if count % world:
        raise CannotShard(f"{count} {what}, which it does not divide")
    return count // world


def own_keys(heads: int, world: int) -> int:
    """Return the heads of keys of one rank; several ranks have the same one where these are fewer. Raise
    CannotShard where their numbers would differ.
    """
    if heads % world and world % heads:
        raise CannotShard(f"{heads} heads of keys, which neither divide nor are divided by it")
    return max(1, heads // world)


class MixerLayer(ABC):
    """The part of a layer that mixes a sequence's rows; here one that keeps nothing and cannot be divided."""

    label: ClassVar[str] = "a mixer"
    recorded: ClassVar[bool] = True
    """False if it has no launches that a GPU could record and repeat."""

    @property
    def cached_features(self) -> int:
        """Numbers that it keeps of a token, for later ones to see."""
        return 0

    def state_bytes(self, item_bytes: int) -> int:  # noqa: ARG002 - mixers that carry a state have some
        """Return what it keeps of a sequence however long that is, where numbers take item_bytes."""
        return 0

    def shard(self, world: int) -> MixerLayer:  # noqa: ARG002 - those that can be divided need it
        """Return the part of one of several ranks; raise CannotShard where there is none."""
        raise CannotShard(f"{self.label}, which is served by one rank alone")

    @abstractmethod
    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""


@dataclass(frozen=True)
class AttentionLayer(MixerLayer):
    """Attention of grouped heads."""

    attention: AttentionSpec
    rope: RopeSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int
    values_are_keys: bool = False
    """True if the projection of the keys serves as values too, without the keys' norm and rotation."""
    values_normed: bool = False
    """True if each head of values is normed, by its size alone."""
    gated: bool = False
    """True if the output of each head is multiplied with the sigmoid of a gate, which its query brings."""
    by_head: bool = False
    """True if one linear has queries, keys and values, those of each head side by side."""
    bidirectional: bool = False
    """True if every row sees the whole sequence, which one step computes, so that nothing is cached."""

    @property
    def heads(self) -> HeadCounts:
        """Return the numbers of heads and their size."""
        return HeadCounts(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def q_features(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Width of the keys of all heads together, and of the values; 0 where another's are read."""
        return 0 if self.attention.keys_of is not None else self.num_kv_heads * self.head_dim

    @property
    def cached_features(self) -> int:
        """Numbers that it keeps of a token, for later ones to see."""
        return 0 if self.attention.keys_of is not None or self.bidirectional else 2 * self.kv_features

    def shard(self, world: int) -> AttentionLayer:
        """Return the part of one of several ranks, as `LayerSpec.shard` does."""
        heads = divided(self.num_heads, world, "query heads")
        return replace(self, num_heads=heads, num_kv_heads=own_keys(self.num_kv_heads, world))

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""
        if self.by_head:
            parts = (self.q_features,) * 3
            out = GroupShape("o", ("attn_dense",), self.q_features, (hidden,))
            return GroupShape(
                "qkv", ("attn_heads",), hidden, (sum(parts),), None, None, self.head_dim, parts
            ), out
        slices = 1 if self.attention.keys_of is not None else 2 if self.values_are_keys else 3
        neighbours = (self.rope.dim, self.head_dim) if self.rope.neighbours else None
        return attention_groups(
            hidden, self.q_features, self.kv_features, slices, gated=self.gated, neighbours=neighbours
        )


@dataclass(frozen=True)
class DeltaLayer(MixerLayer):
    """A gated delta rule: a convolution over a few rows, then a state of each value head."""

    key_heads: int
    value_heads: int
    """A multiple: consecutive ones share a head of keys."""
    key_dim: int
    value_dim: int
    conv_width: int
    """Rows that the convolution sees, the row itself included."""

    @property
    def channels(self) -> int:
        """Width of the queries, keys and values of all heads together."""
        return 2 * self.key_features + self.value_features

    @property
    def key_features(self) -> int:
        """Width of the keys of all heads together."""
        return self.key_heads * self.key_dim

    @property
    def value_features(self) -> int:
        """Width of the values of all heads together."""
        return self.value_heads * self.value_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Return the shape of the rows that the convolution keeps for a sequence."""
        return self.conv_width - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Return the shape of a sequence's state."""
        return self.value_heads, self.key_dim, self.value_dim

    def state_bytes(self, item_bytes: int) -> int:
        """Return what it keeps of a sequence however long that is, where numbers take item_bytes."""
        return math.prod(self.conv_shape) * item_bytes + math.prod(self.state_shape) * 4

    def shard(self, world: int) -> DeltaLayer:
        """Return the part of one of several ranks, as `LayerSpec.shard` does."""
        values = divided(self.value_heads, world, "heads of values of a delta rule")
        return replace(self, key_heads=own_keys(self.key_heads, world), value_heads=values)

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""
        return delta_groups(hidden, self.key_features, self.value_features, self.value_heads)


@dataclass(frozen=True)
class MlpLayer:
    """An MLP."""

    intermediate: int
    gated: bool = True
    """False if its one input is activated, instead of multiplied with an activated gate."""

    def shard(self, world: int) -> MlpLayer:
        """Return the part of one of several ranks, as `LayerSpec.shard` does."""
        return replace(self, intermediate=divided(self.intermediate, world, "columns of the MLP"))

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""
        return mlp_groups(hidden, self.intermediate, gated=self.gated)


@dataclass(frozen=True)
class ClampedGate:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped to the limit before, the gate from above alone."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class ExpertsLayer:
    """Gated MLPs of which a router chooses a few for every row, and perhaps one that all rows have."""

    num: int
    top_k: int
    intermediate: int
    """Width of each expert."""
    renormalised: bool = True
    """True if the weights of the chosen experts sum to 1."""
    shared: int | None = None
    """Width of the expert that all rows have, as far as a gate of its own lets it through."""
    gate: ClampedGate | None = None
    """None: that of the model's activation."""
    bias: bool = False
    """True if the router and the linears of every expert have biases."""
    in_turns: bool = False
    """True if a checkpoint has weights [experts, in, out], with the columns of gate and up interleaved, as the
    rows of an adapter's B are.
    """
    transposed: bool = False
    """True if a checkpoint has weights [experts, in, out], and adapters have A and B in each other's place."""
    either: bool = False
    """True if a checkpoint has weights [experts, in, out] or [experts, out, in], as their shape tells."""
    beside: int | None = None
    """Width of an MLP that all rows have as well; both have norms of their own then."""

    def shard(self, world: int) -> ExpertsLayer:
        """Return the part of one of several ranks: some columns of each expert."""
        own = divided(self.intermediate, world, "columns of an expert")
        shared = None if self.shared is None else divided(self.shared, world, "columns of the shared expert")
        beside = None if self.beside is None else divided(self.beside, world, "columns of the MLP")
        return replace(self, intermediate=own, shared=shared, beside=beside)

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears: two of each expert, and those of the one for all rows."""
        routed = expert_groups(self.num, hidden, self.intermediate)
        if self.beside is not None:
            routed = (*mlp_groups(hidden, self.beside), *routed)
        return routed if self.shared is None else (*routed, *shared_groups(hidden, self.shared))

    def widest(self, hidden: int) -> int:
        """Return the numbers that a row is in at once: as often as it has experts, before and behind each."""
        return self.top_k * (2 * hidden + 3 * self.intermediate)


@dataclass(frozen=True)
class InputLayer:
    """The input that tokens give to a layer directly, as far as the hidden rows let it in."""

    width: int
    """Width of a token's input to each layer."""
    vocab: int
    """Tokens in the table of it."""

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its linears."""
        return input_groups(hidden, self.width)


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer: the mixer of a sequence's rows, and the MLP of each row."""

    mixer: MixerLayer
    mlp: MlpLayer | ExpertsLayer
    inputs: InputLayer | None = None

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return the fused linears of all, in the order of computation."""
        inputs = () if self.inputs is None else self.inputs.groups(hidden)
        return (*self.mixer.groups(hidden), *self.mlp.groups(hidden), *inputs)

    def shard(self, world: int) -> LayerSpec:
        """Return the part of one of several ranks; raise CannotShard where heads or a width are indivisible."""
        return replace(self, mixer=self.mixer.shard(world), mlp=self.mlp.shard(world))

    def attending(self, **changes: Any) -> LayerSpec:
        """Return the layer with other fields of its `AttentionSpec`, if it attends."""
        if not isinstance(self.mixer, AttentionLayer):
            return self
        return self.changing(attention=replace(self.mixer.attention, **changes))

    def changing(self, **changes: Any) -> LayerSpec:
        """Return the layer with other fields of its mixer, if it attends."""
        if not isinstance(self.mixer, AttentionLayer):
            return self
        return replace(self, mixer=replace(self.mixer, **changes))
