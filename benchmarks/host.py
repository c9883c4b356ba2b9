"""What the host does for a step, with the device's work left out: the engine, its batch, copies to the device.

    python -m benchmarks.host [--profile]

Graphs do nothing here and tokens are 0, so all that is measured is schedule, fill and resolve, on one thread. A
GPU hides as much of it as its step takes, for it is one step behind.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import itertools
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, cast
from unittest.mock import patch

import torch

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Adapter
from inference_service.core.sequence import Sequence as EngineSequence
from inference_service.engine import graph_runner
from inference_service.engine.block_manager import BlockManager
from inference_service.engine.engine import Engine
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.graphs import Graph
from inference_service.engine.scheduler import SchedulerLimits

BLOCK_SIZE: Final = 16
VOCAB: Final = 1024
ROWS: Final = 8192
STEPS: Final = 60
NEW: Final = 1024
"""Tokens of an answer: none may end while others begin."""
ACTIVE: Final = 8
"""Adapters that the sequences take in turn."""


@dataclass(frozen=True)
class Point:
    """Sequences of a context, of which so many adapters are loaded; prompt: rows of a prompt in every step."""

    seqs: int
    context: int
    loaded: int = 64
    prompt: int = 0
    most_ms: float | None = None
    """What half of the steps may take."""


POINTS: Final = (
    Point(8, 4096, most_ms=0.3),
    Point(64, 4096, most_ms=1.0),
    Point(256, 4096, most_ms=2.0),
    Point(64, 1024),
    Point(64, 32768),
    Point(64, 4096, loaded=0),
    Point(64, 4096, loaded=1000),
    Point(64, 4096, prompt=256),
)


class _Nothing:
    """A recorder, and the graphs that it records."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record nothing."""
        del work
        return self

    def replay(self) -> None:
        """Do nothing."""


class _Lora:
    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots


def engine_of(point: Point) -> Engine:
    """An engine whose device does nothing."""
    dims = SimpleNamespace(head_dim=128, num_heads=32, num_kv_heads=8, vocab=VOCAB)
    model: Any = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=SimpleNamespace(dims=dims),
        new_cache=lambda _: None,
    )
    longest = point.context + NEW
    blocks = (point.seqs + 4) * -(-longest // BLOCK_SIZE)
    limits = SchedulerLimits(ROWS, point.seqs + 2, max_adapters=16, max_seq_len=longest)
    runner = GraphRunner(model, cast(Any, _Lora(point.loaded)), blocks, BLOCK_SIZE, limits, _Nothing())
    runner.capture()
    return Engine(runner, limits, BlockManager(blocks, BLOCK_SIZE))


def sequences(point: Point) -> Sequence[EngineSequence]:
    """Sequences with contexts that differ, adapter by adapter."""
    found = []
    for number in range(point.seqs):
        slot = number % ACTIVE * max(1, point.loaded // ACTIVE)
        adapter = Adapter(f"a{slot}", slot + 1, slot) if point.loaded else None
        prompt = [number % VOCAB, *itertools.islice(itertools.cycle(range(2, 1000)), point.context - 1)]
        params = SamplingParams(max_tokens=NEW, temperature=0.7, top_p=0.9, seed=number)
        found.append(EngineSequence(str(number), prompt, params, adapter))
    return found


def measure(point: Point, profile: cProfile.Profile | None = None) -> list[float]:
    """Milliseconds of steps in which every sequence decodes."""
    engine = engine_of(point)
    for seq in sequences(point):
        engine.add(seq)
    while engine.stats.waiting or any(seq.num_known < 2 for seq in engine._scheduler.running):
        engine.step()
    assert engine.stats.running == point.seqs  # noqa: S101 - else something else is measured
    gc.collect()
    gc.freeze()
    took = []
    if profile is not None:
        profile.enable()
    for number in range(STEPS // 2):
        if point.prompt:
            prompt = [number, *range(point.prompt - 1)]
            engine.add(EngineSequence(f"prompt-{number}", prompt, SamplingParams(max_tokens=1)))
        begin = time.perf_counter()
        engine.step()
        took.append((time.perf_counter() - begin) * 1e3)
    if profile is not None:
        profile.disable()
    gc.unfreeze()
    return took


def main() -> None:
    """Measure every point; say which bounds are not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="also print where the time of all points goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    profile = cProfile.Profile() if options.profile else None
    print(f"{'seqs':>5} {'context':>8} {'loaded':>7} {'prompt':>7} {'p10 ms':>8} {'p50 ms':>8} {'p90 ms':>8}")
    with patch.object(graph_runner, "RECORDED_ROWS", ROWS):
        for point in POINTS:
            took = measure(point, profile)
            low, *_, high = statistics.quantiles(took, n=10)
            middle = statistics.median(took)
            verdict = "" if point.most_ms is None or middle <= point.most_ms else f"  above {point.most_ms:g}"
            print(
                f"{point.seqs:>5} {point.context:>8} {point.loaded:>7} {point.prompt:>7} "
                f"{low:>8.3f} {middle:>8.3f} {high:>8.3f}{verdict}"
            )
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
