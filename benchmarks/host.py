"""The host's work for a step, without the device's: the engine, its batch, copies to the device.

Graphs do nothing here and tokens are the memory's old content, so the time is that of schedule, fill and
resolve, on one thread. A GPU hides as much of it as its step takes, for it is one step behind; the rest is
lost.

    python -m benchmarks.host

Every sequence decodes in every step that is measured. Launching is left out where a step is too large for a
graph. `starved` adds a queue whose head finds its prefix in the cache and no blocks for the rest, `crowded` a
queue of 1,000 sequences whose adapters are on their way.

    python -m benchmarks.host --eager

measures a step without a graph, with adapters in every linear: the first of its kind, which plans and records
all launches, and those that repeat it. Triton's part of a launch is in it, and the driver's is not; tensors are
torch's "meta" ones, which cost more than real ones.
"""

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
from typing import Any, Final, Literal, Self

import torch

from benchmarks.counts import Counted, Noted
from benchmarks.on_gpu.model import LLAMA_8B, QWEN3_30B_A3B
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine.engine import Engine
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.execution.graphs import Graph
from inference_service.engine.execution.trace import TraceRecorder
from inference_service.engine.kernels.launch import Target, compiling_for
from inference_service.engine.lora.vocabulary import Vocabularies
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
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
EAGER_STEPS: Final = 15
EAGER_ARCHITECTURE: Final = 90
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


class _Nothing(Noted):
    def capture(self, work: Callable[[], None]) -> Graph:
        """Record nothing."""
        del work
        return self


class _Runner(GraphRunner):
    """Launches nothing."""

    def _embed(self, *_step: object) -> None:
        pass

    def _repeat(self, *_step: object, experts: bool) -> None:
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
        self._engine = Engine(runner, limits, BlockManager(blocks, BLOCK_SIZE), Residents())
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


class _Card(Target):
    """Triton's driver of a GPU that is not here, and its launcher and functions: kernels do nothing."""

    @property
    def utils(self) -> Self:
        """Return what loads kernels."""
        return self

    def launcher_cls(self, *_compiled: object) -> Callable[..., None]:
        """Return what launches a kernel."""
        return lambda *_: None

    def get_device_properties(self, _device: int) -> dict[str, int]:
        """Return those of an H100."""
        return {"max_shared_mem": 232448}

    def load_binary(self, *_compiled: object) -> tuple[int, ...]:
        """Return a module, a function, its registers and spills, and threads."""
        return 0, 0, 0, 0, 1024


def eager_ms(shape: Mapping[str, Any]) -> dict[bool, tuple[float, float]]:
    """Return the milliseconds of a processor that a first step takes, and one that repeats it, by adapters."""
    from triton.runtime import driver

    driver.set_active(_Card(EAGER_ARCHITECTURE))
    counted, took = Counted.of(shape, shape["num_hidden_layers"]), {}
    with torch.inference_mode(), compiling_for(EAGER_ARCHITECTURE):
        for adapters in (False, True):
            step = counted.step(EAGER_ROWS, mixed=True, adapters=adapters)
            step()  # compiles
            began = time.thread_time()
            trace = TraceRecorder().capture(step)
            times = [time.thread_time() - began]
            for _ in range(EAGER_STEPS):
                began = time.thread_time()
                trace.replay()
                times.append(time.thread_time() - began)
            took[adapters] = times[0] * 1e3, statistics.median(times[1:]) * 1e3
    return took


def _eager() -> int:
    """Print the time of eager steps; 1 when a bar is not met."""
    print(f"step of {EAGER_ROWS} rows          first   base ms   adapters ms   bar ms")
    status = 0
    for name, (shape, bar) in EAGER_BARS_MS.items():
        took = eager_ms(shape)
        (_, base), (first, adapters) = took[False], took[True]
        print(f"  {name:<20}{first:>12.2f}{base:>10.2f}{adapters:>14.2f}{bar:>9.1f}")
        status = max(status, int(adapters > bar))
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
    if options.eager:
        return _eager()
    os.environ["TRITON_INTERPRET"] = "1"  # the sampler's kernels are launched at the start, and in no step
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
