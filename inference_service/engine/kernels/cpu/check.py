"""The check of a compiled library: every operation once, in both dtypes, against torch.

``python -m inference_service.engine.kernels.cpu.check LIBRARY`` tries one out without risk for the caller.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention

from inference_service.engine.kernels.cpu.ops import BLOCK, Chunks, CpuOps, Table, adapters_of
from inference_service.engine.kernels.delta import DeltaInputs, DeltaStates, DeltaWeights, StateChunk, reference
from inference_service.engine.kernels.integers import quantize
from inference_service.engine.kernels.rows import Activation
from inference_service.engine.kernels.rows.reference import ACTIVATIONS, gated
from inference_service.engine.kernels.sampling import RowParams, draw_rows, scores
from loramux_shared.runtime import Rounding

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Relative tolerance of the norm of the difference."""
HEADS, KV_HEADS, DIM, ROWS = 4, 2, 24, 19
Pair = tuple[Tensor, Tensor]
"""The result of an operation, and the expected one."""


def first_wrong(library: ctypes.CDLL) -> str | None:
    """Return the name of an operation that is missing or computes something else; None if all are right."""
    checks: dict[str, Callable[[CpuOps, torch.Generator], Pair]] = {
        "rms_norm": _norm, "norm of heads": _head_norm, "layer_norm": _layer_norm, "sum": _sum,
        **{name: partial(_activated, name) for name in ACTIVATIONS}, "linear": _linear,
        "compact product": _compact, "product of 8 bits": partial(_integers, Rounding.INT8),
        "product of 4 bits": partial(_integers, Rounding.INT4), "lora": _lora, "attention": _attention,
        "delta_rule": _delta_rule, "draw": _draw, "scores": _scores,
    }  # fmt: skip
    for dtype, tolerance in TOLERANCE.items():
        try:
            ops = CpuOps(library, dtype)
        except AttributeError:
            return "library"
        for name, check in checks.items():
            found, expected = check(ops, torch.Generator().manual_seed(0))
            error = (found.double() - expected.double()).norm() / expected.double().norm()
            if not error < tolerance:
                return name
    return None


def _random(ops: CpuOps, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(ops.dtype)


def _norm(ops: CpuOps, generator: torch.Generator) -> Pair:
    hidden, delta, weight = (_random(ops, generator, *shape) for shape in ((4, 40), (4, 40), (40,)))
    expected = rms_norm((hidden + delta).double(), (40,), None, 1e-6) * (weight.double() + 1)
    return ops.rms_norm(hidden, delta, weight, 1e-6, 1.0), expected


def _head_norm(ops: CpuOps, generator: torch.Generator) -> Pair:
    heads, weight = (_random(ops, generator, *shape) for shape in ((2, 4, DIM), (3, DIM)))
    expected = heads.double()
    expected[:, :3] = rms_norm(heads[:, :3].double(), (DIM,), None, 1e-6) * weight.double()
    ops.norm_heads(heads, weight, 1e-6)
    return heads, expected


def _layer_norm(ops: CpuOps, generator: torch.Generator) -> Pair:
    hidden, delta = (_random(ops, generator, 4, 40) for _ in range(2))
    weight, bias = (_random(ops, generator, 40) for _ in range(2))
    expected = layer_norm((hidden + delta).double(), (40,), weight.double(), bias.double(), 1e-6)
    return ops.layer_norm(hidden, delta, weight, bias, 1e-6), expected


def _sum(ops: CpuOps, generator: torch.Generator) -> Pair:
    x, y = (_random(ops, generator, 4, 40) for _ in range(2))
    expected = 0.3 * (x.double() + y.double())
    return ops.add(x, y, 0.3), expected


def _activated(activation: Activation, ops: CpuOps, generator: torch.Generator) -> Pair:
    both = _random(ops, generator, 3, 2 * 40)
    found = ops.activated(both, activation), ops.activated(both, activation, gated=True)
    expected = ACTIVATIONS[activation](both.double()), gated(both, activation, torch.float64)
    return torch.cat(found, dim=1), torch.cat(expected, dim=1)


def _draw(ops: CpuOps, generator: torch.Generator) -> Pair:
    logits = 3 * _random(ops, generator, 6, 500)
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.5},
    )
    rows = [RowParams(**({"temperature": 0.7, "seed": row} | kind)) for row, kind in enumerate(kinds)]
    found, expected = (torch.tensor(draw(logits, rows)[0]) for draw in (ops.draw, draw_rows))
    return found, expected


def _scores(ops: CpuOps, generator: torch.Generator) -> Pair:
    logits, ids = 3 * _random(ops, generator, 3, 500), torch.tensor([0, 7, 499])
    found, expected = (torch.stack(score(logits, ids, 1)[1:3]) for score in (ops.scores, scores))
    return found, expected


def _lora(ops: CpuOps, generator: torch.Generator) -> Pair:
    x, a, b = (_random(ops, generator, *shape) for shape in ((ROWS, 40), (5, 40), (5, 24)))
    packed = torch.full((5 * 64 + 32 * 6,), torch.nan, dtype=ops.dtype)  # room for either type
    first, second = packed.data_ptr(), packed[5 * 64 :].data_ptr()
    pieces = [(a.data_ptr(), 40, 1, 5, 40, 0, first), (b.data_ptr(), 24, 1, 5, 24, 1, second)]
    ops.pack(Table(np.array(pieces, dtype=np.int64)))
    adapter = Table(np.array([[first, 5, 1, 5, second, 0, 24, *[0] * 12]], dtype=np.int64))
    out = torch.zeros(ROWS, 24, dtype=ops.dtype)
    segments = Table(np.array([[0, 0, ROWS]], dtype=np.int64))
    workspace = torch.empty(ROWS, 5)
    ops.lora(x, out, adapters_of(adapter.address, segments, workspace))
    return out, x.double() @ a.double().t() @ b.double()


def _linear(ops: CpuOps, generator: torch.Generator) -> Pair:
    """One width is made of whole tiles of a matrix unit, the other is not."""
    found, expected = [], []
    for width in (40, 96):
        x, weight, bias = (_random(ops, generator, *shape) for shape in ((ROWS, width), (200, width), (200,)))
        tiled = ops.tiled(weight, bias)
        found.append(x if tiled is None else ops.linear(x, tiled))
        expected.append(x.double() @ weight.double().t() + bias.double())
    return torch.cat(found), torch.cat(expected)


def _compact(ops: CpuOps, generator: torch.Generator) -> Pair:
    """Beside the whole product, where this processor has it."""
    x, weight = (_random(ops, generator, *shape) for shape in ((ROWS, 96), (200, 96)))
    compact, whole = ops.compact(weight), ops.tiled(weight)
    expected = x if whole is None else ops.linear(x, whole)
    return expected if compact is None else ops.linear(x, compact), expected


def _integers(rounding: Rounding, ops: CpuOps, generator: torch.Generator) -> Pair:
    x, weight = (_random(ops, generator, *shape) for shape in ((ROWS, 96), (200, 96)))
    rounded = quantize(weight, rounding)
    tiled = None if rounded is None else ops.tiled_integers(rounded)
    if rounded is None or tiled is None:
        return x, x + 1
    return ops.linear(x, tiled), x.double() @ rounded.widened().double().t()


def _attention(ops: CpuOps, generator: torch.Generator) -> Pair:
    """Rotated by nothing, so that writing the cache and reading it are seen together; the rest is NaN."""
    q, k, v = (_random(ops, generator, ROWS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    fused = torch.cat([q, k, v], dim=1)
    keys, values = (cache.fill_(torch.nan) for cache in ops.new_cache(KV_HEADS, 3 * BLOCK, DIM))
    rows = torch.tensor([(2 - at // BLOCK) * BLOCK + at % BLOCK for at in range(ROWS)])
    parts = torch.split(fused, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    still = torch.ones(ROWS, DIM), torch.zeros(ROWS, DIM)
    ops.rope_write(parts[0], parts[1], parts[2], *still, rows, keys, values)
    chunks = Chunks.make([(0, ROWS, ROWS, [2, 1])])
    found = ops.attention(parts[0].contiguous(), chunks, keys, values, HEADS // KV_HEADS, DIM**-0.5, 0.0, 0)
    q, k, v = (part.double().transpose(0, 1) for part in (q, k, v))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return found, expected.transpose(0, 1).reshape(ROWS, HEADS * DIM)


def _delta_rule(ops: CpuOps, generator: torch.Generator) -> Pair:
    """A state that begins and one that continues; what is wrong in a state shows in the rows behind it."""
    channels = 2 * KV_HEADS * DIM + HEADS * DIM
    qkv, z, b, a = (_random(ops, generator, ROWS, width) for width in (channels, HEADS * DIM, HEADS, HEADS))
    conv, norm = _random(ops, generator, 4, channels), _random(ops, generator, DIM)
    decay, dt_bias = -torch.rand(HEADS, generator=generator), torch.rand(HEADS, generator=generator)
    weights = DeltaWeights(conv, decay, dt_bias, norm, 1e-6)
    chunks = [StateChunk(0, 9, 1, fresh=True), StateChunk(9, ROWS - 9, 0, fresh=False)]

    def outs(compute: Callable[[DeltaInputs], Tensor]) -> Tensor:
        states = DeltaStates.allocate(2, (3, channels), (HEADS, DIM, DIM), qkv)
        return torch.cat([compute(DeltaInputs(qkv, z, b, a, weights, states)) for _ in range(2)])

    table = Table(np.array(chunks, dtype=np.int64))
    expected = outs(lambda inputs: reference.gated_delta(inputs, chunks))
    return outs(lambda inputs: ops.gated_delta(inputs, table)), expected


if __name__ == "__main__":
    wrong = first_wrong(ctypes.CDLL(sys.argv[1]))
    sys.exit(None if wrong is None else f"the compiled {wrong} computes something else")
