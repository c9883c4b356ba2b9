"""Rotary position embeddings in numbers; `inference_service.engine.layers.rope` computes with them.

Sources: https://arxiv.org/abs/2104.09864; the llama3 scaling as in Meta's Llama 3.1 reference code; YaRN
https://arxiv.org/abs/2309.00071; LongRoPE https://arxiv.org/abs/2402.13753.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from loramux_shared.bases.hf_config import HfConfig
from loramux_shared.faults import CheckpointInvalid


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by one factor; a factor of 1 is plain rope."""

    factor: float = 1.0
    magnitude: float = 1.0
    """Factor of cosines and sines."""


@dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    magnitude: float = 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN: Llama3's scaling with the ramp over dimensions instead of wavelengths, and larger magnitudes."""

    factor: float
    original_positions: int
    magnitude: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongRope:
    """A searched factor for each frequency."""

    factors: tuple[float, ...]
    magnitude: float


@dataclass(frozen=True)
class Still:
    """No frequency at all: positions turn nothing."""

    magnitude: float = 1.0


@dataclass(frozen=True)
class Proportional:
    """The first pairs alone, with the frequencies that they have among all; the others do not turn."""

    pairs: int
    factor: float
    """Divisor of the frequencies."""
    magnitude: float = 1.0


Scaling = LinearScaling | Llama3 | Yarn | LongRope | Still | Proportional
"""A scaling of frequencies for longer contexts."""


@dataclass(frozen=True)
class RopeSpec:
    """The rotation of a layer's queries and keys."""

    dim: int
    """Leading dimensions of a head that are rotated."""
    theta: float
    scaling: Scaling = LinearScaling()
    neighbours: bool = False
    """True if a checkpoint rotates dimensions in pairs of neighbours, not of the two halves."""


@dataclass(frozen=True)
class HeadCounts:
    """The heads of a layer."""

    queries: int
    kv: int
    """Heads of keys, and of values."""
    dim: int
    """Dimensions of each."""

    @property
    def group(self) -> int:
        """Query heads that share a head of keys."""
        return self.queries // self.kv


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a layer."""

    scale: float
    """Factor of the products of queries and keys."""
    window: int | None = None
    """Positions that a row sees, its own included; None: all."""
    tumbling: bool = False
    """True if windows stand one behind the other, so that a row sees its own from the first position on."""
    softcap: float | None = None
    """Bound that the scaled products approach, by tanh."""
    keys_of: int | None = None
    """The layer whose keys and values are read, for this one has none; None: its own, which it writes."""


@dataclass(frozen=True)
class QueryScaling:
    """Queries that are multiplied with 1 + beta * log(1 + (position + ahead) // length)."""

    beta: float
    length: int
    ahead: int = 0


ROPE_KINDS: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_OF_LAYERS: Final = tuple(kind for kind in ROPE_KINDS if kind != "longrope")
_ORIGINAL: Final = "original_max_position_embeddings"


def read_rope(
    config: HfConfig,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10000.0,
    default_part: float | None = None,
) -> tuple[RopeSpec, int]:
    """Return the rope that all layers share, and the longest sequence that it serves.

    Of two blocks ``rope_scaling`` counts, unless it is empty, and what stands in a block counts before what
    stands beside it, except for the original length. Without a default part, heads are rotated as a whole.
    """
    block, dim = rope_block(config), head_dim
    if default_part is None:
        refuse_partial(block, config)
    else:
        dim = int(head_dim * rotated_part(block, config, default_part))
    original = original_positions(config, block, max_positions)
    scaling, longest = read_scaling(block, dim, max_positions, original)
    theta = block.number("rope_theta", config.number("rope_theta", default_theta))
    return rope_spec(dim, theta, scaling), longest


def read_rope_of(config: HfConfig, kind: str, dim: int, longest: int, default_theta: float) -> RopeSpec:
    """Return the rope of one type of layers, of a family whose types have their own.

    ``rope_scaling`` is about the full ones, and counts before their block. A type that stands only as ``type``
    does not count against the default that transformers puts there.
    """
    blocks = config.block("rope_parameters")
    fields: dict[str, Any] = {"rope_type": "default"}
    if blocks.fields.get(kind) is not None:
        fields = dict(blocks.block(kind).fields)
    if kind == "full_attention":
        fields.update(config.block("rope_scaling").fields)
    fields["truncate"] = blocks.flag("truncate", default=True)  # transformers reads truncate beside the blocks
    block = HfConfig(fields, config.architecture, config.max_seq_len)
    if rope_kind(block) == "proportional":
        scaling: Scaling = Proportional(
            int(rotated_part(block, config) * dim // 2), block.positive("factor", 1.0)
        )
        return rope_spec(dim, block.number("rope_theta", default_theta), scaling)
    refuse_partial(block, config)
    scaling, _ = read_scaling(block, dim, longest, block.size(_ORIGINAL, longest), _OF_LAYERS)
    return rope_spec(dim, block.number("rope_theta", default_theta), scaling)


def original_positions(config: HfConfig, block: HfConfig, max_positions: int) -> int:
    """Return the longest sequence that the model was first trained for."""
    return config.size(_ORIGINAL, block.size(_ORIGINAL, max_positions))


def with_rope(config: HfConfig, block: Mapping[str, Any]) -> HfConfig:
    """Return a config with a block of rope, if it has none."""
    if config.fields.get("rope_scaling") or config.fields.get("rope_parameters") is not None:
        return config
    return HfConfig({**config.fields, "rope_parameters": block}, config.architecture, config.max_seq_len)


def rope_block(config: HfConfig) -> HfConfig:
    """Return the block that counts; an empty one where there is none."""
    block = config.block("rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters")
    for key, value in block.fields.items():
        if isinstance(value, dict):
            raise CheckpointInvalid(
                f"config.json: {key} in the rope parameters: a separate rope for some layers is not supported "
                f"for {config.architecture}."
            )
    return block


def rotated_part(block: HfConfig, config: HfConfig, default: float = 1.0) -> float:
    """Return the part of each head that is turned."""
    return block.number("partial_rotary_factor", config.number("partial_rotary_factor", default))


def refuse_partial(block: HfConfig, config: HfConfig) -> None:
    """Refuse a config that leaves a part of each head as it is."""
    part = rotated_part(block, config)
    if part != 1.0:
        raise CheckpointInvalid(
            f"config.json: partial_rotary_factor {part} is not supported for {config.architecture}; "
            "supported: 1."
        )


def rope_spec(dim: int, theta: float, scaling: Scaling) -> RopeSpec:
    """Return a rotation of the leading dim dimensions of each head, which are pairs."""
    if dim < 2 or dim % 2:
        raise CheckpointInvalid(f"config.json: rope: expected an even number of dimensions, found {dim}.")
    if theta <= 1:
        raise CheckpointInvalid(f"config.json: rope_theta: expected a number above 1, found {theta}.")
    return RopeSpec(dim, theta, scaling)


def read_scaling(
    block: HfConfig, dim: int, max_positions: int, original: int, kinds: tuple[str, ...] = ROPE_KINDS
) -> tuple[Scaling, int]:
    """Return how a block stretches the frequencies, and the longest sequence that it serves."""
    kind = rope_kind(block)
    if kind not in kinds:
        raise CheckpointInvalid(
            f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(kinds)}."
        )
    if kind == "linear":
        return LinearScaling(block.positive("factor")), max_positions
    if kind == "llama3":
        low, high = block.positive("low_freq_factor"), block.positive("high_freq_factor")
        return Llama3(block.positive("factor"), low, high, original), max_positions
    if kind == "yarn":
        return _yarn(block, original, max_positions / original), max_positions
    if kind == "longrope":
        return read_longrope(block, dim, max_positions, original)
    return LinearScaling(), max_positions  # "dynamic" changes only sequences longer than max_positions


def rope_kind(block: HfConfig) -> str:
    """Return the kind that a rope block names, under its new or its old key."""
    return block.text("rope_type", block.text("type", "default"))


def _yarn(block: HfConfig, original: int, ratio: float) -> Yarn:
    factor = block.positive("factor", ratio)
    mscale, all_dim = block.number("mscale", 0.0), block.number("mscale_all_dim", 0.0)
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0
    return Yarn(
        factor=factor,
        original_positions=original,
        magnitude=block.positive(
            "attention_factor", yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
        ),
        beta_fast=block.positive("beta_fast", 32.0),
        beta_slow=block.positive("beta_slow", 1.0),
        truncate=block.flag("truncate", default=True),
    )


def yarn_mscale(factor: float, scale: float) -> float:
    """Return YaRN's magnitude for positions that are stretched by a factor."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_longrope(block: HfConfig, dim: int, max_positions: int, original: int) -> tuple[LongRope, int]:
    """The short factors up to the original length; the long ones for a deployment that asks for more.

    The model has one set for short sequences and one for long, and keys in the cache carry theirs: a sequence
    cannot pass from one to the other. So the deployment's max_seq_len decides for all.
    """
    max_seq_len = block.max_seq_len
    key, longest = ("short_factor", min(original, max_positions))
    if max_seq_len is not None and max_seq_len > original:
        key, longest = "long_factor", max_positions
    factors = block.numbers(key)
    if len(factors) != dim // 2 or not all(item > 0 for item in factors):
        raise CheckpointInvalid(f"config.json: {key}: expected {dim // 2} positive numbers.")
    ratio = block.positive("factor", max_positions / original)
    magnitude = math.sqrt(1 + math.log(ratio) / math.log(max(original, 2))) if ratio > 1 else 1.0
    return LongRope(tuple(factors), block.positive("attention_factor", magnitude)), longest
