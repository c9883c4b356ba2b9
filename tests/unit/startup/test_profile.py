"""The largest step, the memory plan and the speed of reading, which a start measures, and the allocator."""

import ctypes
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from structlog.testing import capture_logs

from inference_service.core.adapter import Adapter
from inference_service.core.sequence import Batch, Sequence, Token
from inference_service.engine.backends.operations import Backend
from inference_service.engine.execution.runner import Pending, Runner
from inference_service.engine.layers.linear import Linear
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.startup import base, memory, memory as heap
from inference_service.startup.base import BOUND_S, bytes_per_s
from loramux_shared.faults import ResourcesExhausted
from loramux_shared.runtime import Rounding
from loramux_shared.settings import STEP_SIZES, InferenceSettings
from loramux_shared.storage.memory import MemoryStore
from tests.support.tiny import Replica, World

LIMITS = SchedulerLimits(max_tokens=100, max_seqs=8, max_adapters=2, max_seq_len=64)
ADAPTERS = [Adapter("a", 0), Adapter("b", 1), Adapter("c", 2)]


@pytest.fixture(scope="module")
def ready(world: tuple[World, MemoryStore]) -> Replica:
    return world[0].load(world[1])


class Meter(memory.CudaMemory):
    """A device's memory that says what a test scripts, and notes what it is asked."""

    def __init__(self, *usage: tuple[int, int], peak: int = 0) -> None:
        """Take what is free and what is reserved, one pair for each look."""
        self._usage, self._peak = [memory.Usage(*each) for each in usage], peak
        self.asked: list[str] = []

    def settled(self) -> memory.Usage:
        self.asked.append("settled")
        return self._usage.pop(0)

    def watch_peak(self) -> None:
        self.asked.append("watch_peak")

    def peak(self) -> int:
        self.asked.append("peak")
        return self._peak


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        replace(LIMITS, max_tokens=5),  # fewer rows than sequences
        replace(LIMITS, max_tokens=300),  # more prompts than one chunk holds
        replace(LIMITS, max_seqs=1),
        replace(LIMITS, max_adapters=8),
    ],
    ids=str,
)
def test_the_largest_step_fills_every_bound(limits: SchedulerLimits) -> None:
    """The largest step has the most rows and sequences, each at the longest context, with adapters."""
    batch = memory.largest_step(limits, ADAPTERS, 16)
    assert len(batch.chunks) == min(limits.max_seqs, limits.max_tokens)
    assert batch.num_tokens == min(limits.max_tokens, limits.max_seqs * limits.max_seq_len)
    assert {chunk.end for chunk in batch.chunks} == {limits.max_seq_len}
    assert all(chunk.samples for chunk in batch.chunks)
    names = {chunk.seq.adapter.digest for chunk in batch.chunks if chunk.seq.adapter}
    assert len(names) == min(limits.max_adapters, len(ADAPTERS), len(batch.chunks))
    assert all(max(chunk.seq.progress.blocks) < memory.SCRATCH_BLOCKS for chunk in batch.chunks)
    assert all(len(chunk.seq.progress.blocks) * 16 >= limits.max_seq_len for chunk in batch.chunks)


class Noted(Runner):
    """A runner that notes what it ran."""

    ran: list[list[tuple[Sequence, Token]]]

    def submit(self, batch: Batch) -> Pending:
        pending = super().submit(batch)
        self.ran.append(list(pending.tokens()))
        return pending


def test_what_a_step_takes_is_what_it_had_at_once(ready: Replica) -> None:
    """The step runs for real; its runner is freed before the peak of memory is read."""
    adapters = [model.adapter for model in ready.service.local.catalog if model.adapter]
    batch = memory.largest_step(LIMITS, adapters, 16)
    alive: list[weakref.ref[Runner]] = []
    ran: list[list[tuple[Sequence, Token]]] = []

    def new_runner() -> Runner:
        made = Noted(ready.base.model, ready.lora, memory.SCRATCH_BLOCKS, 16)
        made.ran = ran
        alive.append(weakref.ref(made))
        return made

    class Watching(Meter):
        def settled(self) -> memory.Usage:
            self.asked += ["runner went"] if alive and alive[0]() is None else []
            return super().settled()

    meter = Watching((10_000, 1_000), (9_700, 1_200), peak=3_000)
    measured = memory.measure(new_runner, batch, meter)
    assert measured == memory.Measured(steps=1_800, kept=300, free=9_700)
    assert meter.asked == ["settled", "watch_peak", "runner went", "settled", "peak"]
    assert [len(tokens) for tokens in ran] == [8]
    assert all(token.logprob is not None for _, token in ran[0])


def test_a_graph_takes_what_those_behind_the_first_take() -> None:
    """The first graph takes memory that all share; memory that the driver does not show is estimated."""
    recorded: list[int] = []

    class Recording:
        def record_one(self) -> None:
            recorded.append(1)

    runner = cast(Runner, Recording())
    assert memory.measure_graph(lambda: runner, Meter((900 << 20, 0), (860 << 20, 0))) == 10 << 20
    assert len(recorded) == 1 + memory.TRIED
    assert memory.measure_graph(lambda: runner, Meter((900, 0), (900, 0))) == memory.LEAST_GRAPH_BYTES


MB, GB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("pool", "neighbour", "graph"),
    [
        (8 * MB, 0, 12 * MB),  # two of the allocator, ten of the driver
        (8 * MB, GB, 34 * MB),  # the driver's part is bounded
        (8 * MB, -GB, 2 * MB),  # what another process returns hides the driver's part alone
        (0, -GB, memory.LEAST_GRAPH_BYTES),
    ],
    ids=str,
)
def test_a_neighbour_on_the_card_makes_no_graphs(pool: int, neighbour: int, graph: int) -> None:
    """A graph takes what the allocator counts, and no gigabyte that another process took meanwhile."""
    taken = pool + memory.TRIED * 10 * MB + neighbour
    meter = Meter((40 * GB, GB), (40 * GB - taken, GB + pool))
    runner = cast(Runner, SimpleNamespace(record_one=lambda: None))
    assert memory.measure_graph(lambda: runner, meter) == graph


@pytest.mark.parametrize(("neighbour", "kept"), [(0, 300 * MB), (10 * GB, 200 * MB + 2 * GB), (-GB, 200 * MB)])
def test_a_neighbour_is_no_library(neighbour: int, kept: int) -> None:
    """Kept is what this process took; free stays what the device has, not what this process left."""
    before = memory.Usage(40 * GB, GB)
    after = memory.Usage(40 * GB - 300 * MB - neighbour, GB + 200 * MB)
    assert before.growth(after, memory.MAX_DRIVER_BYTES) == kept


def test_a_step_that_does_not_fit_is_refused_by_name(ready: Replica) -> None:
    """Torch's error names neither the settings nor the sizes."""

    class Full:
        depth = 0

        def submit(self, batch: Batch) -> Pending:  # noqa: ARG002 - a runner's signature
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(ResourcesExhausted, match=r"100 tokens and 8 sequences.* 3\.00 GB.*MAX_BATCH_TOKENS"):
        memory.measure(Full, memory.largest_step(LIMITS, [], 16), Meter((3 * 10**9, 0)))


def test_the_cache_gets_what_the_measured_step_leaves(ready: Replica) -> None:
    """The cache has the memory that the largest measured step leaves, and both numbers are logged."""
    requests: list[int] = []

    def measured(longest: int) -> memory.Measured:
        requests.append(longest)
        return memory.Measured(steps=400_000_000, kept=50_000_000, free=1_000_000_000)

    settings = InferenceSettings(deployment="tiny", max_batch_seqs=50_000)
    plan = partial(memory.divide_memory, settings, None, ready.base.model, 7, graphs=False)
    with capture_logs() as logs:
        found = plan(measure=measured)
    assert requests == [256]
    assert 0 <= (1_000_000_000 - 400_000_000) // 4 - found.kv_bytes < 16 * 2 * 2 * 2 * 8 * 4
    events = {entry["item"]: entry for entry in logs if entry["event"] == "memory"}
    assert (events["activations"]["gb"], events["libraries"]["gb"]) == (0.4, 0.05)
    assert 0 < events["activations"]["planned_gb"] < 0.4
    assert "planned_gb" not in events["weights"]


def _numbers(text: str) -> Iterator[int]:
    return (int(word.rstrip(",.")) for word in text.split() if word.rstrip(",.").isdecimal())


def test_sizes_follow_the_device_unless_they_are_set() -> None:
    """Explicit sizes hold on both devices; the others are those of the settings' page."""
    assert InferenceSettings(deployment="tiny").sizes("cuda") == STEP_SIZES["cuda"]
    provided = InferenceSettings(deployment="tiny", max_batch_seqs=3, stream_interval_ms=0)
    for device, usual in STEP_SIZES.items():
        assert provided.sizes(device) == replace(usual, seqs=3, interval_ms=0)
    for device in STEP_SIZES:  # auto leaves a token of a step to each sequence
        assert InferenceSettings(deployment="tiny", max_batch_tokens=9).sizes(device).seqs == 9
        assert InferenceSettings(deployment="tiny", max_batch_seqs=9999).sizes(device).tokens == 9999
    assert provided.sizes("cuda", speculative=4).speculative == 4
    assert provided.sizes("cpu", speculative=0).speculative == 0
    for tokens in (0, 3):
        own = InferenceSettings(deployment="tiny", speculative_tokens=tokens)
        assert own.sizes("cpu", speculative=4).speculative == tokens
    for name, part in {
        "max_batch_tokens": "tokens",
        "max_batch_seqs": "seqs",
        "stream_interval_ms": "interval_ms",
        "speculative_tokens": "speculative",
    }.items():
        reported = list(_numbers(InferenceSettings.model_fields[name].description or ""))[-2:]
        assert reported == [getattr(STEP_SIZES[device], part) for device in ("cpu", "cuda")]


INSIDE, OUTSIDE = 4096, 1024
BYTES = INSIDE * OUTSIDE * 4
"""Bytes of each linear."""


class Products:
    """Operations whose products take what they are made to take, on a clock that they own."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self.count = 0.0, 0
        self._seconds = seconds

    def linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (1, layer.in_features)
        self.now += next(self._seconds)
        self.count += 1
        return x


def measured(monkeypatch, linears: int, seconds: Iterator[float], saved: int = 0) -> tuple[float, Products]:
    """The speed with so many linears, whose products take these seconds."""
    products = Products(seconds)
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: products.now))
    fields: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "operations": products}
    backend = cast(Backend, SimpleNamespace(**fields, quantization=Rounding.NONE))
    linear = cast(Linear, SimpleNamespace(in_features=INSIDE, out_features=OUTSIDE, saved_bytes=saved))
    return bytes_per_s(backend, repeat(linear, linears)), products


def test_the_best_windows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed is that of the best windows, without the first product and without stolen cores."""
    speed, products = measured(monkeypatch, 8, iter([9e-3, 8e-3, 8e-3, 8e-3, 8e-3, 3e-4, 3e-4, 9e-3]))
    assert speed == pytest.approx(BYTES / 3e-4)
    assert products.count == 8


def test_a_start_does_not_wait_for_it_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement of any model ends at the bound: but for the first product, and the running one."""
    _, products = measured(monkeypatch, 10**6, repeat(0.02))
    assert products.now <= BOUND_S + 2 * 0.02


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another libc")
def test_what_a_thread_freed_is_the_systems_again() -> None:
    """Pieces too small to be mapped alone are given back, though the last of them is still there."""
    heap.bound_arenas()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    pieces: list[int] = []

    def load() -> None:
        pieces.extend(libc.malloc(60_000) for _ in range(1000))
        for piece in pieces:
            ctypes.memset(piece, 1, 60_000)
        for piece in pieces[:-1]:
            libc.free(piece)

    heap.give_back()
    before = anonymous()
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    full = anonymous()
    heap.give_back()
    libc.free(pieces[-1])
    assert full - before > 50_000_000
    assert anonymous() - before < 10_000_000
