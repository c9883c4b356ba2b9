"""Random layers of the gated delta rule, and their results in steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inference_service.engine.execution.graphs import Recorder
from inference_service.engine.kernels.delta import (
    DeltaCapacity,
    DeltaInputs,
    DeltaStates,
    DeltaTables,
    DeltaWeights,
    StateChunk,
    delta_tile,
    gated_delta,
    pack_delta,
    reference,
)

SLOTS = 5
Compute = Callable[[DeltaInputs, Sequence[StateChunk]], Tensor]
Sizes = tuple[int, int, int, int]
"""Key heads, value heads, key dim, value dim."""
STEPS: dict[str, list[list[StateChunk]]] = {
    "decode": [[StateChunk(0, 1, 3, True), StateChunk(1, 1, 0, False), StateChunk(2, 1, 4, False)]],
    "prefill, then decode": [
        [StateChunk(0, 3, 2, True), StateChunk(3, 70, 1, True)],
        [StateChunk(0, 1, 1, False), StateChunk(1, 1, 2, False)],
    ],
    "both together": [
        [StateChunk(0, 2, 4, False), StateChunk(2, 1, 3, False), StateChunk(3, 33, 1, True)],
        [StateChunk(1, 16, 1, False), StateChunk(17, 1, 4, False)],
    ],
}
"""Chunks of the steps of each case; behind them is a row of padding, and row 0 of the last one too."""


def layer(
    sizes: Sizes, width: int, dtype: torch.dtype, device: str, slots: int = SLOTS
) -> tuple[DeltaWeights, DeltaStates]:
    """Weights, and states that are random: of two sequences that are in no step, and all others."""
    key_heads, heads, key_dim, value_dim = sizes
    channels = 2 * key_heads * key_dim + heads * value_dim
    weights = DeltaWeights(
        conv=torch.randn(width, channels).to(device, dtype) / width**0.5,
        decay=-torch.rand(heads, device=device).exp(),
        dt_bias=torch.randn(heads, device=device),
        norm=torch.randn(value_dim).to(device, dtype),
        eps=1e-6,
    )
    states = DeltaStates(
        torch.randn(slots, width - 1, channels).to(device, dtype),
        torch.randn(slots, heads, key_dim, value_dim, device=device) / key_dim**0.5,
    )
    return weights, states


def inputs_of(rows: int, sizes: Sizes, weights: DeltaWeights, states: DeltaStates) -> DeltaInputs:
    """Random rows, as columns of a fused linear with NaN beside them."""
    heads, values = sizes[1], sizes[1] * sizes[3]
    channels = weights.conv.shape[1]
    parts = [channels, values, heads, heads, 7]
    wide = torch.randn(rows, sum(parts)).to(weights.norm)
    wide[:, -7:] = torch.nan
    qkv, z, b, a, _ = wide.split(parts, dim=1)
    return DeltaInputs(qkv, z, b, a, weights, states)


def run_steps(name: str, inputs: list[DeltaInputs], compute: Compute) -> list[Tensor]:
    """Compute the steps of a case one after the other; states that begin hold NaN before."""
    outs = []
    for each, chunks in zip(inputs, STEPS[name], strict=True):
        for chunk in chunks:
            if chunk.fresh:
                each.states.conv[chunk.slot] = torch.nan
                each.states.recurrent[chunk.slot] = torch.nan
        outs.append(compute(each, chunks))
    return outs


def case(name: str, sizes: Sizes, width: int, dtype: torch.dtype, device: str) -> list[DeltaInputs]:
    torch.manual_seed(0)
    weights, states = layer(sizes, width, dtype, device)
    ends = [max(chunk.row + chunk.length for chunk in chunks) for chunks in STEPS[name]]
    return [inputs_of(end + 1, sizes, weights, states) for end in ends]


def wrong(name: str, inputs: list[DeltaInputs], compute: Compute) -> float:
    """The largest difference from the reference, of outputs and states, relative to the largest value."""
    states = inputs[0].states
    own = DeltaStates(states.conv.clone(), states.recurrent.clone())
    expected = run_steps(name, [replace(each, states=own) for each in inputs], reference.gated_delta)
    found = run_steps(name, inputs, compute)
    pairs = [*zip(found, expected, strict=True), (states.conv, own.conv), (states.recurrent, own.recurrent)]
    return max(difference(*pair) for pair in pairs)


def replayed(
    lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str, recorder: Recorder
) -> float:
    """The same of one step that was recorded without a chunk; every other sequence begins."""
    torch.manual_seed(0)
    rows, slots, decodes = sum(lengths) + 1, len(lengths) + 1, max(lengths) == 1
    weights, states = layer(sizes, 4, dtype, device, slots)
    inputs = inputs_of(rows, sizes, weights, states)
    capacity = DeltaCapacity(rows, rows if decodes else slots, None if decodes else delta_tile(dtype))
    tables, outs = DeltaTables.allocate(capacity, device), list[Tensor]()
    graph = recorder.capture(lambda: outs.append(gated_delta(inputs, tables)))
    chunks = [
        StateChunk(sum(lengths[:index]), length, slots - 1 - index, fresh=index % 2 == 1)
        for index, length in enumerate(lengths)
    ]
    tables.load(torch.from_numpy(pack_delta(capacity, chunks)))
    own = DeltaStates(states.conv.clone(), states.recurrent.clone())
    expected = reference.gated_delta(replace(inputs, states=own), chunks)
    graph.replay()
    pairs = (outs[-1], expected), (states.conv, own.conv), (states.recurrent, own.recurrent)
    return max(difference(*pair) for pair in pairs)


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value that is expected."""
    error = (found.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max()
    return float(error / expected.double().abs().max())
