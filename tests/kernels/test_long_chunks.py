"""Attention of long chunks by torch's products, over the cache of the compiled operations."""

from ctypes import CDLL
from typing import Any

import pytest
import torch
from torch import Tensor

from inference_service.engine.backends import long_chunks
from inference_service.engine.backends.base import LayerHeads
from inference_service.engine.backends.long_chunks import rows_from_which_torch_is_faster
from inference_service.engine.backends.native_attention import NativeAttention
from inference_service.engine.kernels.attention import Context
from inference_service.engine.kernels.cpu.ops import CpuOps
from loramux_shared.bases.rope import AttentionSpec, HeadCounts

BLOCKS = 12
CONTEXTS = [Context(0, 1, [3], 9), Context(1, 40, [7, 1, 4, 9], 61), Context(41, 20, [2, 10], 20)]
"""One that decodes, a chunk with a past, and a whole prompt."""
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}


@pytest.fixture
def ops(request: pytest.FixtureRequest, compiled: CDLL) -> CpuOps:
    """The operations of this machine, for one dtype."""
    return CpuOps(compiled, request.param)


def attended(
    ops: CpuOps,
    spec: AttentionSpec,
    heads: int,
    kv: int,
    dim: int,
    long_rows: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of a step in a cache that is NaN where nothing was written."""
    torch.manual_seed(0)
    keys, values = ops.new_cache(kv, 16 * BLOCKS, dim)
    for context in CONTEXTS:  # the past, written as steps do
        if past := context.end - context.length:
            _attend(ops, [Context(0, past, context.blocks, past)], keys, values, heads, spec, None, sinks)
    poisoned = sorted(set(range(BLOCKS)) - {block for context in CONTEXTS for block in context.blocks})
    keys[:, poisoned], values[:, poisoned] = torch.nan, torch.nan
    return _attend(ops, CONTEXTS, keys, values, heads, spec, long_rows, sinks)


def _attend(
    ops: CpuOps,
    contexts: list[Context],
    keys: Tensor,
    values: Tensor,
    heads: int,
    spec: AttentionSpec,
    long_rows: int | None,
    sinks: Tensor | None,
) -> Tensor:
    rows, kv = sum(context.length for context in contexts), len(keys)
    dim = keys.shape[2] // 16
    fused = torch.randn(rows, heads + 2 * kv, dim).to(ops.dtype)
    attention = NativeAttention(ops, contexts, 16, long_rows, (spec.window,))
    rotation = attention.prepare_rotation(torch.ones(rows, 1, dim), torch.zeros(rows, 1, dim))
    return attention(LayerHeads(fused, rotation, keys, values, spec, sinks=sinks))


@pytest.mark.parametrize("ops", [torch.float32, torch.bfloat16], indirect=True)
@pytest.mark.parametrize(("heads", "kv", "dim"), [(4, 2, 16), (3, 1, 24), (5, 5, 64)])
@pytest.mark.parametrize("rows", [1, 20, 30])
def test_long_chunks_attend_as_short_ones_do(ops: CpuOps, heads: int, kv: int, dim: int, rows: int) -> None:
    """A step gives the same result whichever chunks use torch's products."""
    spec = AttentionSpec(dim**-0.5)
    expected = attended(ops, spec, heads, kv, dim, None).double()
    found = attended(ops, spec, heads, kv, dim, rows).double()
    assert (found - expected).norm() / expected.norm() < TOLERANCE[ops.dtype]


@pytest.mark.parametrize("ops", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize(
    ("spec", "sinks"),
    [
        (AttentionSpec(0.2, window=16), None),
        (AttentionSpec(0.2, softcap=5.0), None),
        (AttentionSpec(0.2), torch.tensor([1.0, -2.0, 0.0, 3.0])),
    ],
)
def test_layers_with_windows_caps_and_sinks_stay_compiled(
    ops: CpuOps, spec: AttentionSpec, sinks: Tensor | None
) -> None:
    """The answer has every bit that it has when no chunk counts as long."""
    assert torch.equal(attended(ops, spec, 4, 2, 16, None, sinks), attended(ops, spec, 4, 2, 16, 1, sinks))


class Clock:
    """The time that operations take, as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def thread_time(self) -> float:
        return self.now


class Paced(CpuOps):
    """Compiled attention that takes so long as is said, by rows; torch's products take a second."""

    def __init__(self, ops: CpuOps, clock: Clock, seconds: dict[int, float]) -> None:
        self.__dict__ |= ops.__dict__
        self._clock, self._seconds = clock, seconds

    def attention(self, q: Tensor, *_args: Any, **_fields: Any) -> Tensor:
        self._clock.now += self._seconds[len(q)]
        return q

    def in_order(self, keys: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Advance the clock by a second, and begin the product."""
        self._clock.now += 1.0
        return super().in_order(keys, values, dim)


@pytest.mark.parametrize("ops", [torch.float32], indirect=True)
@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({8: 0.5, 32: 0.5, 128: 0.5}, None),
        ({8: 0.5, 32: 1.2, 128: 1.3}, 128),  # a fifth is not worth other bits
        ({8: 2.0, 32: 2.0, 128: 2.0}, 8),
        ({8: 2.0, 32: 0.5, 128: 2.0}, 128),
    ],
)
def test_the_faster_one_is_chosen(
    ops: CpuOps, seconds: dict[int, float], rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's products are chosen from the fewest rows on where they measured faster, if many rows did."""
    clock = Clock()
    monkeypatch.setattr(long_chunks, "time", clock)
    assert rows_from_which_torch_is_faster(Paced(ops, clock, seconds), [HeadCounts(2, 1, 16)]) == rows
