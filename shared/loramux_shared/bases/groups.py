"""The fused linears of a decoder layer, and which adapter modules stand in which slice of them."""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Final


@dataclass(frozen=True)
class GroupShape:
    """A fused linear: one input, the outputs of its slices side by side."""

    name: str
    modules: tuple[str, ...]
    """Bundle module names (TensorRT-LLM's), one per slice."""
    in_features: int
    out_features: tuple[int, ...]
    """Columns of each slice."""
    expert: int | None = None
    """Expert of a mixture that the group belongs to."""
    neighbours: tuple[int, int] | None = None
    """Dimensions of each head of queries and keys that a checkpoint rotates in pairs of neighbours, and all."""
    by_head: int | None = None
    """Dimensions of a head, where a checkpoint has the queries, keys and values of each head side by side."""
    parts: tuple[int, ...] = ()
    """Columns of queries, keys and values, where the first slice has all of them."""

    @property
    def out_offsets(self) -> tuple[int, ...]:
        """First column of each slice."""
        return tuple(sum(self.out_features[:index]) for index in range(len(self.out_features)))

    @property
    def orders(self) -> tuple[tuple[int, ...] | None, ...]:
        """For each slice, the row of a checkpoint and of adapters' B for each column; None: all in order."""
        heads = self.neighbours
        if self.by_head is not None:
            return tuple([_parts_apart(out, self.by_head) for out in self.out_features])
        return tuple(
            None if heads is None or module == "attn_v" else _halves(out, *heads)
            for module, out in zip(self.modules, self.out_features, strict=True)
        )


def layer_groups(hidden: int, intermediate: int, q: int, kv: int) -> tuple[GroupShape, ...]:
    """Return the groups of a Llama-like layer; q and kv are the widths of all heads together."""
    return (*attention_groups(hidden, q, kv), *mlp_groups(hidden, intermediate))


def attention_groups(
    hidden: int,
    q: int,
    kv: int,
    slices: int = 3,
    *,
    gated: bool = False,
    neighbours: tuple[int, int] | None = None,
) -> tuple[GroupShape, ...]:
    """Return those of its attention; slices is how many of queries, keys and values it projects.

    Where it is gated, each head of queries has its gate behind it; neighbours are those of `GroupShape`.
    """
    outs, modules = (2 * q if gated else q, kv, kv)[:slices], ("attn_q", "attn_k", "attn_v")[:slices]
    return (
        GroupShape("qkv", modules, hidden, outs, neighbours=neighbours),
        GroupShape("o", ("attn_dense",), q, (hidden,)),
    )


@cache
def _halves(width: int, rotated: int, dim: int) -> tuple[int, ...]:
    """Return the rows of heads of dim dimensions with the first of each rotated pair before the second ones."""
    head = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, dim)]
    return tuple(first + row for first in range(0, width, dim) for row in head)


@cache
def _parts_apart(width: int, dim: int) -> tuple[int, ...]:
    """Return the rows of all queries, then all keys and all values, of heads that have them side by side."""
    parts = range(0, 3 * dim, dim)
    return tuple(head + part + row for part in parts for head in range(0, width, 3 * dim) for row in range(dim))


def mlp_groups(hidden: int, intermediate: int, *, gated: bool = True) -> tuple[GroupShape, ...]:
    """Return those of its MLP."""
    # gate_proj is mlp_h_to_4h and up_proj is mlp_gate: crossed, as in TensorRT-LLM
    modules = ("mlp_h_to_4h", "mlp_gate") if gated else ("mlp_h_to_4h",)
    return (
        GroupShape("gate_up" if gated else "up", modules, hidden, (intermediate,) * len(modules)),
        GroupShape("down", ("mlp_4h_to_h",), intermediate, (hidden,)),
    )


def input_groups(hidden: int, width: int) -> tuple[GroupShape, ...]:
    """Return those of what tokens give to a layer."""
    return (
        GroupShape("layer_input_gate", ("layer_input_gate",), hidden, (width,)),
        GroupShape("layer_input_projection", ("layer_input_projection",), width, (hidden,)),
    )


def delta_groups(hidden: int, keys: int, values: int, heads: int) -> tuple[GroupShape, ...]:
    """Return those of a gated delta rule; keys and values are widths of all heads, heads those of values."""
    inputs, parts = ("delta_qkv", "delta_z", "delta_b", "delta_a"), (keys, keys, values)
    return (
        GroupShape("delta_in", inputs, hidden, (sum(parts), values, heads, heads), parts=parts),
        GroupShape("delta_out", ("delta_out",), values, (hidden,)),
    )


def named_apart(layers: Iterable[tuple[GroupShape, ...]]) -> tuple[tuple[GroupShape, ...], ...]:
    """Return the groups of each layer with different names for different shapes."""
    named: dict[GroupShape, GroupShape] = {}
    uses: Counter[str] = Counter()
    each = tuple(layers)
    for shape in itertools.chain.from_iterable(dict.fromkeys(each)):
        if shape not in named:
            uses[shape.name] += 1
            count = uses[shape.name]
            named[shape] = shape if count == 1 else replace(shape, name=f"{shape.name}.{count}")
    return tuple(tuple([named[shape] for shape in layer]) for layer in each)


def distinct(layers: Iterable[tuple[GroupShape, ...]]) -> tuple[GroupShape, ...]:
    """Return every group once, in the order in which layers have them."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(dict.fromkeys(layers))))


def features_of(groups: Iterable[GroupShape]) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every module of some groups."""
    return {
        module: (group.in_features, out)
        for group in groups
        for module, out in zip(group.modules, group.out_features, strict=True)
    }


EXPERTS_GATE_UP: Final = "experts_gate_up"
EXPERTS_DOWN: Final = "experts_down"
GROUPS_APART: Final = 2
"""Groups from one of an expert to the same of the next expert."""
MODULES_APART: Final = 3


def expert_groups(num: int, hidden: int, intermediate: int) -> tuple[GroupShape, ...]:
    """Return the groups of a mixture: of each expert two, which lie side by side."""
    found = []
    for expert in range(num):
        gate_up, down = group_of(EXPERTS_GATE_UP, expert), group_of(EXPERTS_DOWN, expert)
        both = intermediate, intermediate
        found += [
            # crossed as above
            GroupShape(gate_up, ("moe_h_to_4h", "moe_gate"), hidden, both, expert),
            GroupShape(down, ("moe_4h_to_h",), intermediate, (hidden,), expert),
        ]
    return tuple(found)


def shared_groups(hidden: int, intermediate: int) -> tuple[GroupShape, ...]:
    """Return those of an expert that all rows have, and of its gate."""
    return (
        GroupShape("shared_gate_up", ("shared_h_to_4h", "shared_gate"), hidden, (intermediate, intermediate)),
        GroupShape("shared_down", ("shared_4h_to_h",), intermediate, (hidden,)),
        GroupShape("shared_expert_gate", ("shared_expert_gate",), hidden, (1,)),
    )


def group_of(name: str, expert: int) -> str:
    """Return the name of an expert's group."""
    return f"{expert}.{name}"


def name_of_all(name: str) -> str:
    """Return what the groups of all experts are called together that are called like this one."""
    return name.partition(".")[2]
