"""Checks before anything is timed: the kernels' tests, and steps of real sizes beside torch's operations."""

import importlib.util
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.on_gpu.device import ROOT, Device
from benchmarks.on_gpu.model import LLAMA_8B, QWEN3_30B_A3B, TINY, RandomTensors, config_of, random_adapter
from benchmarks.on_gpu.run import Run
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence as EngineSequence
from inference_service.engine.backends.base import LoraBackend
from inference_service.engine.backends.operations import Operations
from inference_service.engine.backends.torch_lora import TorchLora
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution.runner import Runner, lay_out
from inference_service.engine.kernels.sampling import (
    RowParams,
    SamplingTables,
    pack_rows,
    reference as sampling_reference,
    sample,
)
from inference_service.engine.models.decoder import Decoder
from inference_service.startup.merged import hold
from loramux_shared.bases.config import ModelConfig
from tests.kernels import delta_case

FOLDER: Final = "tests/kernels"
NEEDS_NO_GPU: Final = (
    "test_aot.py",
    "test_compile_kernels.py",
    "test_compiled_cache.py",
    "test_counts.py",
    "test_cpu_ops.py",
    "test_gpu_benchmark.py",
    "test_interpreter.py",
)
"""Ahead-of-time compilation, the interpreter, and the CPU's operations."""
REHEARSED_TEST: Final = "test_attention_tables.py"
WORKERS: Final = 8
"""Most of a GPU's first run of the tests is compiling; each has a context of half a gigabyte on the card."""
TESTS_S: Final = 450.0
"""More than they should take, first compilations and recordings of graphs included: what hangs is red."""
MODEL_TOLERANCE: Final = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
"""Largest error of a logit, relative to the largest one: two layers round in another order."""
LAYERS: Final = 2
BLOCK_SIZE: Final = 16
SCALE: Final = 0.1
"""Scale of adapters, with which they add more than the base's products do."""
DELTA_TOLERANCE: Final = {torch.bfloat16: 4e-2, torch.float32: 1e-4}
"""Tolerance of outputs and states, relative to the largest: later rows of a sequence have the earlier errors
too.
"""
Check = Callable[[Device], tuple[float, float]]
"""Returns the worst error and its bound."""


class Red(RuntimeError):
    """A kernel computes wrongly: nothing may be timed."""


def run(run: Run) -> None:
    """Test and check.

    Raises:
        Red: a test failed, or an error is above its bound.
    """
    run_tests(run)
    run_checks(run, run.choose(CHECKS, REHEARSED_CHECKS))


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
        Red: one failed.
        TimeoutExpired: they did not end.
    """
    tests = [f"{FOLDER}/{REHEARSED_TEST}"]
    environment = dict(os.environ)
    if not run.device.rehearses:
        tests = [FOLDER, *(f"--ignore={FOLDER}/{name}" for name in NEEDS_NO_GPU)]
        # Compiled kernels refuse tensors of the CPU: what passes without the interpreter ran on the GPU.
        environment.pop("TRITON_INTERPRET", None)
        if importlib.util.find_spec("xdist"):
            tests += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(  # noqa: S603 - our own tests
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TESTS_S, check=False
    )
    lines = done.stdout.strip().splitlines()[-40:]
    if done.returncode != 0:
        raise Red("\n".join(["the kernels' tests fail:", *lines, *done.stderr.strip().splitlines()[-5:]]))
    run.note(f"pytest {' '.join(tests)}: {lines[-1].strip('= ')}")


def model(shape: dict[str, Any], ranks: Sequence[int], lengths: Sequence[int]) -> Check:
    """Logits of two layers beside those of torch's operations: of prompts, and of steps behind them."""

    def check(device: Device) -> tuple[float, float]:
        config = config_of({**shape, "num_hidden_layers": LAYERS})
        own = TritonLora(config.groups, LAYERS, device.dtype, device.where)
        theirs = TorchLora(config.groups, device.dtype, device.where)
        triton = TritonOperations(config.heads, device.dtype, device.where)
        plain = Operations(device.dtype, device.where)
        ours = _logits(device, config, triton, own, ranks, lengths)
        expected = _logits(device, config, plain, theirs, ranks, lengths)
        error = float((ours - expected).abs().max() / expected.abs().max())
        return (error if error == error else torch.inf), MODEL_TOLERANCE[device.dtype]

    return check


def _logits(
    device: Device,
    config: ModelConfig,
    operations: Operations,
    lora: LoraBackend,
    ranks: Sequence[int],
    lengths: Sequence[int],
) -> Tensor:
    """Return float32 logits of three steps; sequences have the adapters in turn, and the first has none."""
    torch.manual_seed(0)
    model = Decoder(config, RandomTensors(device.dtype, device.where), operations)
    hold(lora, *(random_adapter(config, rank, device.dtype, SCALE) for rank in ranks))
    seqs, blocks = list[EngineSequence](), 0
    for index, length in enumerate(lengths):
        adapter = Adapter(f"{index:064x}", (index - 1) % len(ranks)) if index else None
        seq = EngineSequence(
            str(index), [(7 * at) % 251 for at in range(length + 34)], SamplingParams(), adapter
        )
        need = -(-(length + 34) // BLOCK_SIZE)
        seq.progress.blocks = array("i", range(blocks, blocks + need))
        blocks += need
        seqs.append(seq)
    runner, found = Runner(model, lora, blocks, BLOCK_SIZE), []
    with torch.inference_mode():
        for rows in (lengths, [1] * len(lengths), [33 if index % 2 else 1 for index in range(len(lengths))]):
            chunks = [Chunk(seq, count) for seq, count in zip(seqs, rows, strict=True)]
            laid = lay_out(Batch(tuple(chunks)), {})
            laid = replace(laid, last_rows=[context.row + context.length - 1 for context in laid.contexts])
            found.append(runner._forward(laid)[0].float())
            for seq, count in zip(seqs, rows, strict=True):
                seq.progress.num_computed += count
    return torch.cat(found)


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


def delta_rule(lengths: Sequence[int], sizes: delta_case.Sizes) -> Check:
    """A gated delta rule of chunks that begin and others that continue, recorded without a chunk."""

    def check(device: Device) -> tuple[float, float]:
        error = delta_case.replayed(lengths, sizes, device.dtype, str(device.where), device.recorder())
        device.wait()
        return error, DELTA_TOLERANCE[device.dtype]

    return check


CHECKS: Final[dict[str, Check]] = {
    "8B, mixed ranks": model(LLAMA_8B, (16, 64, 8), (4000, 700, 300, 17, 1)),
    "30B-A3B": model(QWEN3_30B_A3B, (16, 64), (700, 64, 1)),
    "delta rule, a decode step": delta_rule([1] * 32, (16, 32, 128, 128)),
    "delta rule, prompts and decode": delta_rule([700, 1, 64, 1, 33], (16, 48, 128, 128)),
    "sampler, 128256 tokens": sampler(128256),
}
REHEARSED_CHECKS: Final[dict[str, Check]] = {
    "model": model(TINY, (8, 3), (20, 5, 1)),
    "delta rule": delta_rule([20, 1], (1, 2, 16, 16)),
    "sampler": sampler(300),
}
