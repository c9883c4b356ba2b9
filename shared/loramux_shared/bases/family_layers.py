"""The parts of decoder layers that few families have: other routers, activations and latent attention."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from loramux_shared.bases.groups import GroupShape, expert_groups, shared_groups
from loramux_shared.bases.layers import AttentionLayer, ExpertsLayer, MlpLayer


@dataclass(frozen=True)
class RoutedLayer(ExpertsLayer):
    """Experts of which another router chooses, beside those that all rows have without a gate."""

    scores: Literal["sigmoid", "softmax", "sparsemixer"] = "sigmoid"
    """Function of the router's outputs; a sparsemixer weighs each choice among those that come close to it."""
    corrected: bool = False
    """True if a bias of each expert is added to the scores for the choice, and not for the weights."""
    correction: str | None = None
    """Name of the tensor [1, experts] of these biases; None: they are the router's, [experts]."""
    num_groups: int = 1
    """Groups of consecutive experts, of which a row first chooses the best ones."""
    top_groups: int = 1
    scaling: float = 1.0
    """Factor of the weights."""
    jitter: float = 0.0
    """Distance, relative to a sparsemixer's choice, within which others count: twice this."""
    scales_inputs: bool = False
    """True if the weight of an expert multiplies its input, and not its output."""

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears: two of each expert, and two of those for all rows."""
        routed = expert_groups(self.num, hidden, self.intermediate)
        return routed if self.shared is None else (*routed, *shared_groups(hidden, self.shared)[:2])


@dataclass(frozen=True)
class PlainLayer(MlpLayer):
    """An MLP without a gate, with another activation."""

    gated: bool = False
    activation: Literal["relu2", "xielu"] = "relu2"
    """max(0, x)^2, or xIELU, whose curve each layer has learned."""


@dataclass(frozen=True)
class TemperedLayer(AttentionLayer):
    """Attention of which some layers norm heads by their size alone, and some scale queries by position."""

    normed: bool = False
    """True if each head of queries and keys is normed."""
    tempered: bool = False
    """True if queries have the factors of the decoder's `QueryScaling`."""


@dataclass(frozen=True)
class LatentLayer(AttentionLayer):
    """Attention whose keys and values are made of few numbers a token, and of a rotated part for all heads.

    ``head_dim`` is that of queries and keys, of which the last ``rope.dim`` dimensions are rotated.
    """

    label: ClassVar[str] = "latent attention"

    q_rank: int | None = None
    """Numbers of which queries are made; None: of the hidden rows."""
    kv_rank: int = 0
    value_dim: int = 0
    """Dimensions of a head of values."""

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its fused linears."""
        first, width = ("attn_q", self.q_features) if self.q_rank is None else ("latent_q_a", self.q_rank)
        both = width, self.kv_rank + self.rope.dim
        expanded = self.num_heads * (self.head_dim - self.rope.dim + self.value_dim)
        queries = GroupShape("latent_q", ("latent_q_b",), self.q_rank or 0, (self.q_features,))
        return (
            GroupShape("latent_in", (first, "latent_kv_a"), hidden, both),
            *(() if self.q_rank is None else (queries,)),
            GroupShape("latent_kv", ("latent_kv_b",), self.kv_rank, (expanded,)),
            GroupShape("o", ("attn_dense",), self.num_heads * self.value_dim, (hidden,)),
        )
