"""Rope as ``config.json`` says it: in ``rope_parameters``, or as before transformers 5 in several keys."""

from __future__ import annotations

import math

from shared.bases.hf_config import HfConfig
from shared.bases.rope import Linear, Llama3, LongRope, RopeSpec, Scaling, Yarn
from shared.faults import CheckpointInvalid

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(
    config: HfConfig, head_dim: int, max_positions: int, *, partial: bool = False
) -> tuple[RopeSpec, int]:
    """Return the rope that all layers share, and the longest sequence that it serves.

    With partial, a part of each head may stay as it is; else a config that says so is refused.
    """
    block = config.block("rope_parameters" if config.fields.get("rope_parameters") else "rope_scaling")
    part = block.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if part != 1.0 and not partial:
        raise CheckpointInvalid(
            f"config.json: partial_rotary_factor {part} is not supported for {config.architecture}; "
            "supported: 1."
        )
    theta = block.number("rope_theta", config.number("rope_theta", 10000.0))
    original = config.integer(
        "original_max_position_embeddings", block.integer("original_max_position_embeddings", max_positions)
    )
    dim = int(head_dim * part)
    scaling, longest = read_scaling(block, dim, max_positions, original)
    return RopeSpec(dim, theta, scaling), longest


def read_scaling(block: HfConfig, dim: int, max_positions: int, original: int) -> tuple[Scaling, int]:
    """Return how a block stretches the frequencies, and the longest sequence that it serves."""
    kind = block.text("rope_type", block.text("type", "default"))
    if kind == "su" or (kind == "yarn" and "long_factor" in block.fields):  # Phi-3's names before longrope
        kind = "longrope"
    if kind not in ROPE_KINDS:
        raise CheckpointInvalid(
            f"config.json: rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}."
        )
    if kind == "linear":
        return Linear(block.number("factor")), max_positions
    if kind == "llama3":
        low, high = block.number("low_freq_factor"), block.number("high_freq_factor")
        return Llama3(block.number("factor"), low, high, original), max_positions
    if kind == "yarn":
        return _yarn(block, original, max_positions / original), max_positions
    if kind == "longrope":
        return _longrope(block, dim, max_positions, original)
    return Linear(), max_positions  # "dynamic" changes only sequences longer than max_positions


def _yarn(block: HfConfig, original: int, ratio: float) -> Yarn:
    factor = block.number("factor", ratio)
    mscale, all_dim = block.number("mscale", 0.0), block.number("mscale_all_dim", 0.0)
    if not (mscale and all_dim):
        mscale, all_dim = 1.0, 0.0
    return Yarn(
        factor=factor,
        original_positions=original,
        magnitude=block.number("attention_factor", _mscale(factor, mscale) / _mscale(factor, all_dim)),
        beta_fast=block.number("beta_fast", 32.0),
        beta_slow=block.number("beta_slow", 1.0),
        truncate=block.flag("truncate", default=True),
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(block: HfConfig, dim: int, max_positions: int, original: int) -> tuple[LongRope, int]:
    """The short factors up to the original length; the long ones for a deployment that asks for more.

    The model has one set for short sequences and one for long, and keys in the cache carry theirs: a sequence
    cannot pass from one to the other. So the deployment's max_seq_len decides for all.
    """
    wanted = block.max_seq_len
    key, longest = ("short_factor", min(original, max_positions))
    if wanted is not None and wanted > original:
        key, longest = "long_factor", max_positions
    factors = block.array(key) or []
    if len(factors) != dim // 2 or not all(isinstance(item, int | float) and item > 0 for item in factors):
        raise CheckpointInvalid(f"config.json: {key}: expected {dim // 2} positive numbers.")
    ratio = block.number("factor", max_positions / original)
    magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return LongRope(tuple(map(float, factors)), block.number("attention_factor", magnitude)), longest
