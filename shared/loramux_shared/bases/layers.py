"""What decoder layers are made of. Layers of one decoder may differ in all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from loramux_shared.bases.attention import AttentionSpec, HeadCounts
from loramux_shared.bases.groups import GroupShape, attention_groups, expert_groups, mlp_groups, shared_groups
from loramux_shared.bases.rope import RopeSpec


@dataclass(frozen=True)
class AttentionLayer:
    """Attention of grouped heads."""

    attention: AttentionSpec
    rope: RopeSpec
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def heads(self) -> HeadCounts:
        """How many heads, of which size."""
        return HeadCounts(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def q_features(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        """Width of the keys of all heads together, and of the values."""
        return self.num_kv_heads * self.head_dim

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""
        return attention_groups(hidden, self.q_features, self.kv_features)


@dataclass(frozen=True)
class MlpLayer:
    """A gated MLP."""

    intermediate: int

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""
        return mlp_groups(hidden, self.intermediate)


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
    """Of each."""
    renormalised: bool = True
    """Whether the weights of those that were chosen sum to 1."""
    shared: int | None = None
    """What is the same of the one that all rows have, as far as a gate of its own lets it through."""
    gate: ClampedGate | None = None
    """None: that of the model's activation."""
    bias: bool = False
    """Of the router, and of the linears of every expert."""
    in_turns: bool = False
    """Whether a checkpoint has weights [experts, in, out], and of gate and up a column of each in turns, as an
    adapter's B has rows."""

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears: two of each expert, and those of the one for all rows."""
        routed = expert_groups(self.num, hidden, self.intermediate)
        return routed if self.shared is None else (*routed, *shared_groups(hidden, self.shared))


@dataclass(frozen=True)
class LayerSpec:
    """What mixes the rows of a sequence, and what follows for each row alone."""

    mixer: AttentionLayer
    mlp: MlpLayer | ExpertsLayer

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return the fused linears of both, in the order of computation."""
        return (*self.mixer.groups(hidden), *self.mlp.groups(hidden))

    def attending(self, **changes: Any) -> LayerSpec:
        """Return the layer with other fields of its `AttentionSpec`."""
        attention = replace(self.mixer.attention, **changes)
        return replace(self, mixer=replace(self.mixer, attention=attention))

    def turning(self, rope: RopeSpec) -> LayerSpec:
        """Return the layer with another rotation."""
        return replace(self, mixer=replace(self.mixer, rope=rope))
