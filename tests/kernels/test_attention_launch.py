"""Attention's launcher: which changes a captured launch survives, and which are refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from inference_service.engine.kernels.attention import AttentionTables, HeadNorm, Inputs, prefill_tile
from tests.kernels.attention_case import Case, Heads, Layout, expect_right, make_case, poison, reloaded

DECODES = [(1, end) for end in (190, 1, 16, 17, 63)]
LATER: list[list[tuple[int, int]]] = [DECODES, [(1, 5), (20, 33), (7, 150)], [(31, 31)], [(1, 130)], []]


@pytest.mark.parametrize(("window", "cuts"), [(None, True), (100, False)])
def test_captured_launches_serve_every_later_step(window: int | None, cuts: bool, device: str) -> None:
    """Grids frozen at capture cover all tables at replay; decode and prefill leave each other's rows alone."""
    case = make_case(Layout([(1, 20)], padding=30, spare=10), Heads(4, 1), window=window, device=device)
    out, (rope, decode, prefill, *merge) = case.planned()
    capacity = case.tables.capacity
    assert (decode.grid, prefill.grid) == ((1, capacity.decode_items), (1, capacity.prefill_items))
    assert [launch.grid for launch in merge] == [(4, capacity.merges)] * cuts
    launches = [rope, prefill, decode, *merge]

    def replay() -> torch.Tensor:
        poison(launches)
        for launch in launches:
            launch()
        return out

    for chunks in LATER:
        expect_right(reloaded(case, replace(case.layout, chunks=chunks)), replay)


def test_the_memory_of_a_layer_is_what_its_capacity_says(device: str) -> None:
    """The memory plan reads the capacity, and the launches take that much."""
    case = make_case(Layout([(1, 300), (20, 600)]), device=device)
    decode = case.planned()[1][1].arguments
    taken = sum(decode[name].numel() * decode[name].element_size() for name in ("p_partial", "p_lse"))
    assert taken == case.tables.capacity.workspace_bytes(6, 16)


REFUSALS: dict[str, Callable[[Inputs], dict[str, torch.Tensor]]] = {
    "12 rows, but tables for 11": lambda at: {
        name: getattr(at, name)[[0, *range(11)]] for name in ("heads", "cos", "sin")
    },
    "heads must have 3 dimensions": lambda at: {"heads": at.heads[0]},
    "the heads of a row must be contiguous": lambda at: {"heads": at.heads[:, ::2]},
    "keys must be torch.float32": lambda at: {"keys": at.keys.half()},
    "keys must have 16 dimensions": lambda at: {"keys": at.keys[..., :8], "values": at.values[..., :8]},
    "the same shape and strides": lambda at: {"values": at.values[:, 1:]},
    "5 query heads cannot share 2": lambda at: {"heads": at.heads[:, 1:]},
    "cos and sin must be": lambda at: {"cos": at.cos[1:]},
    "an even part of 16": lambda at: {"cos": at.cos[:, 1:], "sin": at.sin[:, 1:]},
    "compute in": lambda at: {
        name: getattr(at, name).double() for name in ("heads", "cos", "sin", "keys", "values")
    },
}
MISFITS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "norm does not fit 8 heads of 16": lambda case: {"norm": HeadNorm(case.inputs.cos.new_ones(7, 16), 1e-5)},
    "sinks must be of 6 query heads, got 5": lambda case: {"sinks": case.inputs.cos.new_ones(5)},
    "tables must be on": lambda case: {"tables": AttentionTables.allocate(case.tables.capacity, "meta")},
    "a tile has at most": lambda case: {"tables": _tables(case, tile=1000)},
    "65535": lambda case: {"tables": _tables(case, chunks=70000)},
}


def _tables(case: Case, **changed: int) -> AttentionTables:
    return AttentionTables.allocate(replace(case.tables.capacity, **changed), case.inputs.keys.device)


def _misfit(case: Case, message: str) -> Case:
    if message in REFUSALS:
        return replace(case, inputs=replace(case.inputs, **REFUSALS[message](case.inputs)))
    return replace(case, **MISFITS[message](case))


@pytest.mark.parametrize("message", [*REFUSALS, *MISFITS])
def test_what_does_not_fit_is_refused(message: str, device: str) -> None:
    """A launch with wrong tensors is a ValueError with the expected and the actual shape, before any kernel."""
    case = make_case(Layout([(1, 20), (10, 30)]), device=device)
    with pytest.raises(ValueError, match=message):
        _misfit(case, message).planned()


def test_large_heads_and_groups_are_refused() -> None:
    """A size that no tile holds is refused when the tables are made."""
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="at most 512 dimensions, got 544"):
        prefill_tile(cpu, torch.float16, 544, 1)
    with pytest.raises(ValueError, match="at most 128 query heads share a head of keys, got 130"):
        prefill_tile(cpu, torch.float16, 64, 130)
