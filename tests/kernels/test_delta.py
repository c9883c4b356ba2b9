"""The gated delta rule against transformers, and everything else against it."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from inference_service.engine.kernels import delta
from inference_service.engine.kernels.cpu.ops import CpuOps, Table
from inference_service.engine.kernels.launch import Launch, intercepted
from tests.kernels.delta_case import STEPS, Sizes, case, inputs_of, layer, wrong
from tests.kernels.place import COMPILED

SIZES = {"shared": (2, 4, 16, 8), "odd": (3, 3, 24, 40)}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def by_kernels(inputs: delta.DeltaInputs, chunks: Sequence[delta.StateChunk]) -> Tensor:
    """Compute with tables that have room for more and held other steps, and memory that holds NaN before."""
    rows = len(inputs.qkv)
    if all(chunk.length == 1 and chunk.row == index for index, chunk in enumerate(chunks)):
        capacity = delta.DeltaCapacity(rows + 2, rows + 2)
    else:
        capacity = delta.DeltaCapacity(rows + 3, len(chunks) + 2, delta.delta_tile(inputs.qkv.dtype))
    tables = delta.DeltaTables.allocate(capacity, inputs.qkv.device)
    stale = np.full(capacity.packed_size, 1, dtype=np.int32)
    tables.load(torch.from_numpy(delta.pack_delta(capacity, chunks, out=stale)))
    with intercepted(_poisoned):
        return delta.gated_delta(inputs, tables)


def _poisoned(launch: Launch) -> None:
    """Enqueue a launch after filling its outputs with NaN."""
    written = {"conv_kernel": ["p_out"], "prepare_kernel": ["p_values", "p_reads", "p_weights", "p_total"]}
    names = ["p_out"] if launch.arguments.get("ALONE") else written.get(launch.kernel.fn.__name__, [])
    for name in names:
        launch.arguments[name].fill_(torch.nan)
    launch.enqueue()


@pytest.mark.parametrize(
    ("name", "sizes", "dtype"),
    [
        ("decode", "odd", torch.bfloat16),
        ("decode", "shared", torch.float32),
        ("prefill, then decode", "odd", torch.float32),
        ("both together", "shared", torch.bfloat16),
    ],
)
def test_kernels_compute_the_reference(name: str, sizes: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and states, over tiles that are full and not; padding and other slots are left alone."""
    width = 4 if sizes == "shared" else 3
    assert wrong(name, case(name, SIZES[sizes], width, dtype, device), by_kernels) < TOLERANCE[dtype]


DECODES, MIXED = delta.DeltaCapacity(2, 2), delta.DeltaCapacity(8, 2, 16)
REFUSALS: dict[str, Callable[[], object]] = {
    "3 chunks, but room for 2": lambda: delta.pack_delta(MIXED, [delta.StateChunk(0, 1, 0, fresh=True)] * 3),
    "rows up to 9, but room for 8": lambda: delta.pack_delta(MIXED, [delta.StateChunk(0, 9, 0, fresh=True)]),
    "a chunk has rows and a slot": lambda: delta.pack_delta(MIXED, [delta.StateChunk(0, 1, -1, fresh=True)]),
    "chunk 0 has row 0": lambda: delta.pack_delta(DECODES, [delta.StateChunk(1, 1, 0, fresh=True)]),
    "as many of both": lambda: delta.DeltaCapacity(4, 2),
    "must be positive": lambda: delta.DeltaCapacity(0, 0),
    "9 rows, but tables for 8": lambda: _refused(rows=9),
    "tiles of torch.float32 have 16 rows, got tables for 32": lambda: _refused(tile=32),
    r"z must be \(4, 32\)": lambda: _refused(z=31),
    "at most 128 dimensions, got 144 and 8": lambda: _refused(sizes=(2, 4, 144, 8)),
    "no queries, keys and values of 3 value heads": lambda: _refused(sizes=(2, 3, 16, 8)),
    "at least 2 rows, got 1": lambda: _refused(width=1),
}


def _refused(
    rows: int = 4, tile: int = 16, z: int | None = None, sizes: Sizes = SIZES["shared"], width: int = 4
) -> None:
    inputs = inputs_of(rows, sizes, *layer(sizes, width, torch.float32, "cpu"))
    if z is not None:
        inputs = replace(inputs, z=inputs.z[:, :z])
    delta.gated_delta(inputs, delta.DeltaTables.allocate(delta.DeltaCapacity(8, 2, tile), "cpu"))


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message: str) -> None:
    """A ValueError names the expected and the actual value."""
    if COMPILED:
        pytest.skip("the tensors are on the CPU")
    with pytest.raises(ValueError, match=message):
        REFUSALS[message]()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", STEPS)
def test_the_compiled_operation_computes_the_reference(
    compiled: ctypes.CDLL, name: str, sizes: str, dtype: torch.dtype
) -> None:
    """Outputs and states, over strips that are full and not; other slots are left alone."""
    ops = CpuOps(compiled, dtype)

    def compute(inputs: delta.DeltaInputs, chunks: Sequence[delta.StateChunk]) -> Tensor:
        out = ops.gated_delta(inputs, Table(np.array(chunks, dtype=np.int64)))
        covered = {row for chunk in chunks for row in range(chunk.row, chunk.row + chunk.length)}
        out[[row for row in range(len(out)) if row not in covered]] = 0
        return out

    assert wrong(name, case(name, SIZES[sizes], 4, dtype, "cpu"), compute) < TOLERANCE[dtype]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_the_compiled_operation_does_not_see_chunks(
    compiled: ctypes.CDLL,
) -> None:
    """A sequence has the same bits at once and row by row, beside others and alone."""
    ops = CpuOps(compiled, torch.bfloat16)
    weights, states = layer((8, 16, 32, 80), 4, torch.bfloat16, "cpu")
    inputs = inputs_of(90, (8, 16, 32, 80), weights, states)

    def compute(*chunks: delta.StateChunk) -> Tensor:
        return ops.gated_delta(inputs, Table(np.array(chunks, dtype=np.int64)))

    whole = compute(delta.StateChunk(10, 80, 3, fresh=True), delta.StateChunk(0, 10, 1, fresh=True))[10:]
    after = states.recurrent[3].clone()
    parts = [compute(delta.StateChunk(10, 66, 2, fresh=True))[10:76]]
    parts += [compute(delta.StateChunk(row, 1, 2, fresh=False))[row : row + 1] for row in range(76, 90)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(states.recurrent[2], after)
