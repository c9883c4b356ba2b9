"""The checks before anything is timed: the kernels' tests, then fresh inputs of real sizes against fp64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.machine import ROOT
from benchmarks.on_gpu.run import Run, Scale
from inference_service.kernels import experts as kernels_of_experts, rows
from inference_service.kernels.experts import reference as experts_reference
from inference_service.kernels.rows import reference as rows_reference
from inference_service.kernels.sampling import (
    RowParams,
    SamplingTables,
    pack_rows,
    reference as sampling_reference,
    sample,
)
from inference_service.kernels.sgmv import PREFILL_TILE, pack_segments
from tests.kernels import attention_case, delta_case, sgmv_case

NEEDS_NO_GPU: Final = ("test_aot.py", "test_cpu_ops.py", "test_counts.py")
"""Ahead-of-time compilation, and the CPU's operations."""
QUICK_TESTS: Final = ("test_sgmv.py", "test_attention.py")
REHEARSED_TEST: Final = "test_attention_tables.py::test_only_blocks_in_use_are_copied"
WORKERS: Final = 12
"""Most of a GPU's first run of the tests is compiling."""
TESTS_S: Final = 300.0
"""Far more than they take: what hangs is red."""
ROW_TOLERANCE: Final = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest relative error of an element of a norm or a gate: two to three roundings."""


DELTA_TOLERANCE: Final = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
"""Tolerance of outputs and states, relative to the largest: later rows of a sequence have the earlier errors
too.
"""


class Red(RuntimeError):
    """A kernel computes wrongly: nothing may be timed."""


def run(run: Run) -> None:
    """Test and check.

    Raises:
        Red: a test failed, or an error is above its bound.
    """
    run_tests(run)
    run_checks(run, CHECKS if run.scale is not Scale.REHEARSAL else REHEARSED_CHECKS)


def run_checks(run: Run, checks: Mapping[str, Check]) -> None:
    """Check one after the other.

    Raises:
        Red: an error is above its bound, or is none.
    """
    for name, check in checks.items():
        worst, bound = check(run.device)
        # Errors are no timings: they are reported in a rehearsal too.
        run.add({"check": name}, {"error": f"{worst:.2g}", "bound": f"{bound:.2g}"})
        if not worst <= bound:
            raise Red(f"{name}: error {worst:.3g}, at most {bound:.3g} is right")


def run_tests(run: Run) -> None:
    """Run the kernels' tests in a process of their own, on the GPU where there is one.

    Raises:
        Red: one failed, or they did not end in time.
    """
    folder = "tests/kernels"
    tests = [f"{folder}/{REHEARSED_TEST}"]
    environment = dict(os.environ)
    if not run.device.rehearses:
        tests = [f"{folder}/{name}" for name in QUICK_TESTS] if run.scale is Scale.QUICK else [folder]
        tests += [f"--ignore={folder}/{name}" for name in NEEDS_NO_GPU]
        # Compiled kernels refuse tensors of the CPU: what passes without the interpreter ran on the GPU.
        environment.pop("TRITON_INTERPRET", None)
        if importlib.util.find_spec("xdist"):
            tests += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(  # noqa: S603 - our own tests
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TESTS_S
        )
    except subprocess.TimeoutExpired as error:
        raise Red(f"the kernels' tests did not end in {TESTS_S:.0f} s") from error
    lines = done.stdout.strip().splitlines()[-40:]
    if done.returncode != 0:
        raise Red("\n".join(["the kernels' tests fail:", *lines, *done.stderr.strip().splitlines()[-5:]]))
    run.note(f"pytest {' '.join(tests)}: {lines[-1].strip('= ')}")


Check = Callable[[Device], tuple[float, float]]
"""Returns the worst error and its bound."""


def sgmv(**case: Any) -> Check:
    """SGMV, launched and then replayed from a graph with other segments than it was recorded with."""

    def check(device: Device) -> tuple[float, float]:
        made = sgmv_case.make_case(**case, dtype=device.dtype, device=str(device.where))
        before = made.out.clone()
        made.run()
        worst = float(sgmv_case.relative_errors(made.out, before, made).max())
        graph = device.recorder().capture(made.run)
        later = sorted(case["slots"], reverse=True)
        made.x.nan_to_num_(nan=1.0)  # rows that were the base's have an adapter now
        made.segments.load(torch.from_numpy(pack_segments(made.segments.capacity, later)))
        made.workspace.fill_(torch.nan)
        made.out.copy_(before)
        graph.replay()
        device.wait()
        worst = max(worst, float(sgmv_case.relative_errors(made.out, before, made).max()))
        base = [row for row, slot in enumerate(later) if slot < 0]
        untouched = torch.equal(made.out[base], before[base])
        return worst if untouched else torch.inf, sgmv_case.TOLERANCE[device.dtype]

    return check


def attention(chunks: Sequence[tuple[int, int]], heads: attention_case.Heads, **options: Any) -> Check:
    """Attention over scattered blocks, the rest of the cache poisoned."""

    def check(device: Device) -> tuple[float, float]:
        layout = attention_case.Layout(chunks, decode_only=all(length == 1 for length, _ in chunks))
        made = attention_case.make_case(layout, heads, dtype=device.dtype, device=str(device.where), **options)
        keys, values = made.inputs.keys.clone(), made.inputs.values.clone()
        found = attention_case.errors(made.run(), made.expected(keys, values))
        return float(found.max()), attention_case.TOLERANCE[device.dtype]

    return check


def row_kernels(num: int, dim: int, width: int) -> Check:
    """Norm with addition, gate, embedding and cap."""

    def check(device: Device) -> tuple[float, float]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=device.dtype, device=device.where)

        hidden, delta, weight, gate_up = draw(num, dim), draw(num, dim), draw(dim), draw(num, 2 * width)
        tokens = torch.arange(num, device=device.where).flip(0)
        logits, fp64 = draw(num, width) * 20, torch.float64
        normed = rows.rms_norm(hidden, weight, eps=1e-5, delta=delta)  # hidden is the sum from here on
        pairs = [(normed, rows_reference.rms_norm(hidden, weight, eps=1e-5, offset=0.0, dtype=fp64))]
        pairs.append((rows.gated(gate_up, "silu"), rows_reference.gated(gate_up, "silu", fp64)))
        pairs.append((rows.embed(tokens, delta, 3.0), rows_reference.embed(tokens, delta, 3.0, fp64)))
        capped = rows_reference.softcap(logits, 30.0, fp64)
        rows.softcap(logits, 30.0)
        pairs.append((logits, capped))
        return max(_worst(found, expected) for found, expected in pairs), ROW_TOLERANCE[device.dtype]

    return check


def sampler(vocab: int) -> Check:
    """Tokens drawn otherwise than by sorting in fp64."""

    def check(device: Device) -> tuple[float, float]:
        requests = [RowParams(), RowParams(1.0, seed=5), RowParams(0.7, top_k=50, seed=9, num_generated=3)]
        requests += [RowParams(1.2, top_p=0.9, seed=2), RowParams(1.0, min_p=0.05, seed=-1)]
        logits = torch.randn(len(requests), vocab, dtype=device.dtype, device=device.where) * 3
        tables = SamplingTables.allocate(len(requests), vocab, device.where)
        tables.load(torch.from_numpy(pack_rows(len(requests), requests)))
        ids = torch.full((len(requests),), -7, dtype=torch.int64, device=device.where)
        sample(logits, tables, ids)
        expected = sampling_reference.sample(logits.cpu(), requests)
        return float((ids.cpu() != expected).sum()), 0.0

    return check


def mixture(num: int, dim: int, width: int, experts: int, top_k: int) -> Check:
    """Routes, grouped products of tokens and of places, and their weighted sum, recorded with other tokens."""

    def check(device: Device) -> tuple[float, float]:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=device.dtype, device=device.where)

        x, logits = draw(num, dim), draw(num, experts)
        up, down, bias = draw(experts, width, dim), draw(experts, dim, width) / width, draw(experts, width)

        def work() -> tuple[kernels_of_experts.Routed, Tensor]:
            routed = kernels_of_experts.route(logits, top_k, renormalised=True)
            pairs = kernels_of_experts.by_expert(routed.ids, experts)
            hidden = kernels_of_experts.grouped(x, up, pairs, bias, of_tokens=True)
            return routed, kernels_of_experts.combine(
                kernels_of_experts.grouped(hidden, down, pairs), routed, pairs
            )

        made: list[tuple[kernels_of_experts.Routed, Tensor]] = []
        graph = device.recorder().capture(lambda: made.append(work()))
        for tensor in (x, logits):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        device.wait()
        routed, found = made[-1]
        each = x[:, None].expand(-1, top_k, -1)
        hidden = experts_reference.grouped(each, routed.ids, up, bias, torch.float64).to(device.dtype)
        y = experts_reference.grouped(hidden, routed.ids, down, None, torch.float64)
        expected = experts_reference.combine(y, routed, torch.float64)
        same = torch.equal(routed.ids.sort().values.long(), logits.float().topk(top_k).indices.sort().values)
        error = float((found.double() - expected).norm() / expected.norm())
        return error if same else torch.inf, ROW_TOLERANCE[device.dtype]

    return check


def delta_rule(lengths: Sequence[int], sizes: delta_case.Sizes) -> Check:
    """A gated delta rule of chunks that begin and others that continue, recorded without a chunk."""

    def check(device: Device) -> tuple[float, float]:
        error = delta_case.replayed(lengths, sizes, device.dtype, str(device.where), device.recorder())
        device.wait()
        return error, DELTA_TOLERANCE[device.dtype]

    return check


def _worst(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of an element; those near 0 count as 0.01."""
    error = (found.double() - expected).abs() / expected.abs().clamp(min=1e-2)
    return float(error.nan_to_num(nan=torch.inf).max())


_MIXED: Final = [
    (16, 16, 16),
    (64, 0, 8),
    (8, 8, 8),
    (0, 0, 0),
    (32, 16, 16),
    (16, 0, 16),
    (64, 64, 64),
    (4, 4, 4),
]
_DECODE: Final[dict[str, Any]] = {
    "slots": [(7 * row) % 9 - 1 for row in range(64)],
    "ranks": _MIXED,
    "K": 4096,
    "sizes": (4096, 1024, 1024),
}
_DOWN: Final[dict[str, Any]] = {
    "slots": list(range(16)) * 2,
    "ranks": [(16,)] * 16,
    "K": 14336,
    "sizes": (4096,),
}
_PREFILL: Final[dict[str, Any]] = {
    "slots": [0] * 300 + [-1] * 50 + [1] * 170 + [2] * 40,
    "ranks": [(16, 16), (64, 8), (128, 128)],
    "K": 4096,
    "sizes": (14336, 14336),
    "tile": PREFILL_TILE,
}
_HEADS: Final = attention_case.Heads(32, 8, 128)
_OF_64: Final = attention_case.Heads(64, 8, 64)
CHECKS: Final[dict[str, Check]] = {
    "sgmv qkv, mixed ranks": sgmv(**_DECODE),
    "sgmv down": sgmv(**_DOWN),
    "sgmv gate and up, prompts": sgmv(**_PREFILL),
    "attention, decode": attention([(1, 4096), (1, 513), (1, 17), (1, 2000)], _HEADS),
    "attention, one long context": attention([(1, 32000)], _HEADS),
    "attention, prompts and decode": attention([(1, 3000), (512, 2048), (300, 300), (1, 1)], _HEADS),
    "attention, one long context among short ones": attention([(1, 4000)] + [(1, 20)] * 31, _HEADS),
    "attention, a short suffix of a long prefix": attention([(33, 4033), *[(1, 500)] * 7], _HEADS),
    "attention, the same with a group of 6, heads of 96, a window and a cap": attention(
        [(1, 4000), (33, 4033), (1, 20)], attention_case.Heads(48, 8, 96), window=3000, softcap=50.0
    ),
    "attention, window and cap": attention([(1, 3000), (512, 2048)], _HEADS, window=1024, softcap=50.0),
    "attention, sinks": attention([(1, 4000), (33, 4033), (1, 20)], _OF_64, sinks=True),
    "attention, sinks and window": attention([(1, 3000), (512, 2048)], _OF_64, window=128, sinks=True),
    "norm, gate, embedding, cap": row_kernels(64, 4096, 14336),
    "experts, a decode step": mixture(8, 2048, 1536, 128, 8),
    "experts, a prompt": mixture(512, 2048, 1536, 128, 8),
    "delta rule, a decode step": delta_rule([1] * 32, (16, 32, 128, 128)),
    "delta rule, prompts and decode": delta_rule([700, 1, 64, 1, 33], (16, 48, 128, 128)),
    "sampler, 128256 tokens": sampler(128256),
}
REHEARSED_CHECKS: Final[dict[str, Check]] = {
    "sgmv": sgmv(slots=[0, 1, -1, 1], ranks=[(4, 0), (8, 4)], K=64, sizes=(32, 16)),
    "attention": attention([(1, 20), (5, 5)], attention_case.Heads(2, 1, 16)),
    "norm, gate, embedding, cap": row_kernels(2, 64, 96),
    "experts": mixture(3, 32, 24, 5, 2),
    "delta rule": delta_rule([20, 1], (1, 2, 16, 16)),
    "sampler": sampler(300),
}
