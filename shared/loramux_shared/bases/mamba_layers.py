"""The parts of decoder layers with Mamba-2: its mixer, alone or beside attention, and what else they have."""

import math
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NoReturn

from loramux_shared.bases.groups import GroupShape, mlp_groups
from loramux_shared.bases.layers import AttentionLayer, CannotShard, ExpertsLayer, MixerLayer, MlpLayer

LABEL: Final = "a Mamba-2 mixer"
UNSCALED: Final = (1.0,) * 5
Gating = Literal["then norm", "behind norm", "alone"]
"""Whether the output is gated and then normed, normed and then gated, or gated alone."""


@dataclass(frozen=True)
class MambaLayer(MixerLayer):
    """A Mamba-2 mixer: a convolution over a few rows, then a state of each head."""

    label: ClassVar[str] = LABEL
    recorded: ClassVar[bool] = False

    heads: int
    head_dim: int
    num_groups: int
    """Consecutive heads of a group share what writes to their states and what reads them."""
    state_dim: int
    conv_width: int
    """Rows that the convolution sees, the row itself included."""
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    gating: Gating = "then norm"
    step_limits: tuple[float, float] = (0.0, math.inf)
    """The shortest and the longest step of a row."""
    in_scale: float = 1.0
    """Factor of the hidden rows."""
    part_scales: tuple[float, ...] = UNSCALED
    """Factors of the parts of the input projection: gate, values, what writes, what reads, steps."""
    out_scale: float = 1.0
    """Factor of the output."""

    @property
    def features(self) -> int:
        """Width of the values of all heads together."""
        return self.heads * self.head_dim

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of the parts of the input projection: gate, values, what writes, what reads, steps."""
        shared = self.num_groups * self.state_dim
        return self.features, self.features, shared, shared, self.heads

    @property
    def channels(self) -> int:
        """Width of what is convolved: values, what writes and what reads."""
        return sum(self.parts[1:4])

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Return the shape of the rows that the convolution keeps for a sequence."""
        return self.conv_width - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Return the shape of a sequence's state."""
        return self.heads, self.head_dim, self.state_dim

    def state_bytes(self, item_bytes: int) -> int:
        """Return what it keeps of a sequence however long that is, where numbers take item_bytes."""
        return math.prod(self.conv_shape) * item_bytes + math.prod(self.state_shape) * 4

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its linears."""
        return (
            GroupShape("mamba_in", ("mamba_in",), hidden, (sum(self.parts),)),
            GroupShape("mamba_out", ("mamba_out",), self.features, (hidden,)),
        )


@dataclass(frozen=True, kw_only=True)
class SideLayer(AttentionLayer):
    """Attention beside a Mamba-2 mixer, which reads the same rows; the sum of both is added."""

    label: ClassVar[str] = LABEL
    recorded: ClassVar[bool] = False

    mamba: MambaLayer
    in_scale: float = 1.0
    """Factor of the hidden rows before attention."""
    out_scale: float = 1.0
    """Factor of the output of attention."""

    def state_bytes(self, item_bytes: int) -> int:
        """Return what the mixer keeps of a sequence however long that is."""
        return self.mamba.state_bytes(item_bytes)

    def shard(self, world: int) -> NoReturn:  # noqa: ARG002 - as the others
        """Refuse to be divided.

        Raises:
            CannotShard: always.
        """
        raise CannotShard(f"{LABEL}, which is served by one rank alone")

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return the linears of both."""
        return (*super().groups(hidden), *self.mamba.groups(hidden))


@dataclass(frozen=True)
class MlpMixer(MixerLayer):
    """An MLP in the place of a mixer: max(0, up x)^2, and down again."""

    label: ClassVar[str] = "a layer of an MLP alone"

    intermediate: int

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:
        """Return its linears."""
        return mlp_groups(hidden, self.intermediate, gated=False)


@dataclass(frozen=True)
class NoMlp(MlpLayer):
    """Nothing, behind a mixer that is a layer by itself."""

    intermediate: int = 0

    def groups(self, hidden: int) -> tuple[GroupShape, ...]:  # noqa: ARG002 - as the others
        """Return no linear."""
        return ()


@dataclass(frozen=True)
class ScaledMlp(MlpLayer):
    """A gated MLP with factors."""

    gate_scale: float = 1.0
    """Factor of the gate, before it is activated."""
    out_scale: float = 1.0
    """Factor of the output."""


@dataclass(frozen=True)
class SharedLayer(ExpertsLayer):
    """Experts beside an MLP of all rows, both of which read the same normed rows."""
