"""The host's work for a step, without the device's: the engine, its batch, copies to the device.

Graphs do nothing here and tokens are the memory's old content, so the time is that of schedule, fill and
resolve, on one thread. A GPU hides as much of it as its step takes, for it is one step behind; the rest is
lost.

    python -m benchmarks.host

Every sequence decodes in every step that is measured. Launching is left out where a step is too large for a
graph. `starved` adds a queue whose head finds its prefix in the cache and no blocks for the rest, `crowded` a
queue of 1,000 sequences whose adapters are on their way.

    python -m benchmarks.host --eager

measures what planning all launches of a step without a graph takes, with adapters in every linear; Triton's own
part of a launch is left out, and tensors are torch's "meta" ones, which cost more than real ones.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final, Literal

import torch

from benchmarks.counts import Counted
from benchmarks.on_gpu.model import LLAMA_8B, QWEN3_30B_A3B
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.buffers import StepBuffers
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.graphs import Graph
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.residents import AlwaysResident
from inference_service.kernels.launch import intercepted
from inference_service.kernels.sgmv import Segments
from inference_service.lora.vocabulary import StepVocabulary, Vocabularies
from loramux_shared.bases.rope import HeadCounts

Kind = Literal["decode", "starved", "crowded"]
BLOCK_SIZE: Final = 16
VOCAB: Final = 1024
ROWS: Final = 512
"""Rows of a step, where its sequences need fewer."""
PROMPT: Final = 256
"""Tokens of a prompt that waits."""
CROWD: Final = 1000
STEPS: Final = 48
"""Steps that are measured: every sequence needs a block in three of them."""
WARM_UP: Final = 16
ACTIVE: Final = 8
"""Adapters that the sequences take in turn."""
BARS_MS: Final = {8: 0.3, 64: 1.0, 256: 2.0, 1024: 8.0}
"""Bounds of half of the steps' processor time, by sequences that decode at the context below."""
CONTEXTS: Final = (1024, 4096, 32768)
BAR_CONTEXT: Final = 4096
LOADED: Final = 64
EAGER_ROWS: Final = 1024
EAGER_STEPS: Final = 9
EAGER_BARS_MS: Final = {"8B, 32 layers": (LLAMA_8B, 6.0), "30B-A3B, 48 layers": (QWEN3_30B_A3B, 12.0)}
CONTEXT_BAR: Final = 2.2
"""Times as long may a step take at the longest context as at the shortest."""


@dataclass(frozen=True)
class Point:
    """The parameters of a measured step."""

    kind: Kind
    seqs: int
    context: int
    """Tokens of each sequence when the measuring begins, less up to a block."""
    loaded: int
    """Adapters; 0: all sequences are the base's."""


class _Nothing:
    """A recorder, and the graphs that it records."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record nothing."""
        del work
        return self

    def replay(self) -> None:
        """Do nothing."""


class _Runner(GraphRunner):
    """Launches nothing."""

    def _embed(self, buffers: StepBuffers, own: StepVocabulary | None = None) -> None:
        pass

    def _compute(self, buffers: StepBuffers, segments: Segments | None, *, experts: bool = True) -> None:
        pass


class Bench:
    """An engine whose device does nothing, with sequences that decode."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._numbers = itertools.count()
        self._adapters: dict[int, Adapter] = {}
        """Keyed by slot; those of the queue are on their way and have none."""
        growth = (point.seqs + 1) * (2 + (WARM_UP + STEPS) // BLOCK_SIZE)
        prompts = 0 if point.kind == "starved" else 4 * PROMPT // BLOCK_SIZE
        blocks = ACTIVE * -(-point.context // BLOCK_SIZE) + growth + prompts
        longest = blocks * BLOCK_SIZE if point.kind == "starved" else point.context + 2 * PROMPT
        rows = max(ROWS, point.seqs + PROMPT)
        limits = SchedulerLimits(rows, point.seqs + 4, ACTIVE, longest, watermark=0.0)
        model: Any = SimpleNamespace(
            device=torch.device("cpu"),
            dtype=torch.float32,
            config=SimpleNamespace(
                dims=SimpleNamespace(vocab=VOCAB, hidden=4096),
                heads=(HeadCounts(32, 8, 128),),
                windows=(None,),
                state_bytes=lambda _: 0,
            ),
            new_cache=lambda _: None,
        )
        lora: Any = SimpleNamespace(num_slots=point.loaded, vocabularies=Vocabularies(), has_experts=False)
        runner = _Runner(model, lora, blocks, BLOCK_SIZE, limits, _Nothing())
        runner.capture()
        runner._logits.zero_()  # no numbers would end sequences
        self._engine = Engine(runner, limits, BlockManager(blocks, BLOCK_SIZE), AlwaysResident())
        self._fill()
        if point.kind == "starved":
            self._add(blocks * BLOCK_SIZE, adapter=0)
        for number in range(CROWD if point.kind == "crowded" else 0):
            self._add(PROMPT, adapter=ACTIVE + number)
        for _ in range(WARM_UP):
            self.step()

    @property
    def running(self) -> Sequence[EngineSequence]:
        """The sequences that decode."""
        return self._engine._scheduler.running

    def step(self) -> tuple[float, float]:
        """Return the milliseconds that a step takes, and those of the thread on a processor."""
        began, began_cpu = time.perf_counter(), time.thread_time()
        self._engine.step()
        return (time.perf_counter() - began) * 1e3, (time.thread_time() - began_cpu) * 1e3

    def _fill(self) -> None:
        """Bring all sequences to decode; all but the first of an adapter find their prompt in the cache."""
        for number in range(self._point.seqs):
            length = self._point.context - number // ACTIVE % BLOCK_SIZE
            seq = self._add(length, adapter=number % ACTIVE)
            while number < ACTIVE and not seq.num_known:
                self._engine.step()
        while not seq.num_known:
            self._engine.step()

    def _add(self, length: int, adapter: int) -> EngineSequence:
        number = next(self._numbers)
        stride = max(1, self._point.loaded // ACTIVE)
        slot = adapter * stride if adapter < ACTIVE else ACTIVE * stride + adapter
        known = None
        if self._point.loaded:
            resident = slot if adapter < ACTIVE else None
            known = self._adapters.setdefault(slot, Adapter(f"{slot:064x}", resident))
        tokens = list(itertools.islice(itertools.cycle(range(2, 1000)), length))
        params = SamplingParams(temperature=0.7, top_p=0.9, seed=number)
        seq = EngineSequence(str(number), tokens, params, known)
        self._engine.add(seq)
        return seq


def measure(point: Point) -> tuple[float, float]:
    """Return the medians of the milliseconds of a step, and of those on a processor: less on a busy machine."""
    bench = Bench(point)
    gc.collect()
    gc.freeze()
    steps = [bench.step() for _ in range(STEPS)]
    gc.unfreeze()
    took, cpu = zip(*steps, strict=True)
    return statistics.median(took), statistics.median(cpu)


def eager_ms(shape: Mapping[str, Any]) -> dict[bool, float]:
    """Return the milliseconds of a processor that a step of EAGER_ROWS takes to be planned, by adapters."""
    counted, took = Counted(shape, shape["num_hidden_layers"]), {}
    with torch.inference_mode(), intercepted(lambda _: None):
        for adapters in (False, True):
            step = counted.step(EAGER_ROWS, mixed=True, adapters=adapters)
            times = []
            for _ in range(EAGER_STEPS):
                began = time.thread_time()
                step()
                times.append((time.thread_time() - began) * 1e3)
            took[adapters] = statistics.median(times)
    return took


def _eager() -> int:
    """Print the time of eager steps; 1 when a bar is not met."""
    print(f"eager step of {EAGER_ROWS} rows   base ms   adapters ms   bar ms")
    status = 0
    for name, (shape, bar) in EAGER_BARS_MS.items():
        took = eager_ms(shape)
        print(f"  {name:<24}{took[False]:>10.2f}{took[True]:>14.2f}{bar:>9.1f}")
        status = max(status, int(took[True] > bar))
    return status


def points() -> Iterator[Point]:
    """Yield what is measured."""
    for seqs, context in itertools.product(BARS_MS, CONTEXTS):
        yield Point("decode", seqs, context, LOADED)
    yield Point("starved", 64, BAR_CONTEXT, LOADED)
    yield Point("crowded", 64, BAR_CONTEXT, LOADED)


def missed(found: Mapping[Point, float]) -> Iterator[str]:
    """Yield the bars that are not met."""
    for point, cpu in found.items():
        if point.kind != "decode":
            continue
        bar = BARS_MS[point.seqs]
        if point.context == BAR_CONTEXT and cpu > bar:
            yield f"{point.seqs} sequences of {point.context}: above {bar} ms"
        if cpu > CONTEXT_BAR * found[replace(point, context=CONTEXTS[0])]:
            yield f"{point.seqs} sequences of {point.context}: above {CONTEXT_BAR} times the shortest context"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; 1 when a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eager", action="store_true", help="steps without a graph, and nothing else")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"  # the sampler's kernels are launched at the start, and in no step
    if options.eager:
        return _eager()
    found = {}
    print("kind      seqs  context    p50 ms   cpu p50")
    for point in points():
        took, found[point] = measure(point)
        print(f"{point.kind:8} {point.seqs:5} {point.context:8} {took:9.3f} {found[point]:9.3f}", flush=True)
    complaints = list(missed(found))
    print("\n".join(complaints) or "bars: met")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
