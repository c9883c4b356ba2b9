"""The fused linears of a decoder layer, and which adapter modules stand in which slice of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupShape:
    """A fused linear: one input, the outputs of its slices side by side."""

    name: str
    modules: tuple[str, ...]
    """Bundle module names (TensorRT-LLM's), one per slice."""
    in_features: int
    out_features: tuple[int, ...]
    """Columns of each slice."""

    @property
    def out_offsets(self) -> tuple[int, ...]:
        """First column of each slice."""
        return tuple(sum(self.out_features[:index]) for index in range(len(self.out_features)))


def layer_groups(hidden: int, intermediate: int, q: int, kv: int) -> tuple[GroupShape, ...]:
    """Return the groups of a Llama-like layer; q and kv are the widths of all heads together."""
    return (
        GroupShape("qkv", ("attn_q", "attn_k", "attn_v"), hidden, (q, kv, kv)),
        GroupShape("o", ("attn_dense",), q, (hidden,)),
        # gate_proj is mlp_h_to_4h and up_proj is mlp_gate: crossed, as in TensorRT-LLM
        GroupShape("gate_up", ("mlp_h_to_4h", "mlp_gate"), hidden, (intermediate, intermediate)),
        GroupShape("down", ("mlp_4h_to_h",), intermediate, (hidden,)),
    )
