"""A step of an 8B-shaped model: with adapters, prompts and penalties, from Python and from graphs."""

from __future__ import annotations

import gc
import math
import statistics
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Final

import torch

from benchmarks.on_gpu.device import Device
from benchmarks.on_gpu.model import LLAMA_8B, TINY, RandomTensors, config_of, random_adapter
from benchmarks.on_gpu.run import Run
from benchmarks.on_gpu.targets import OF_BASE
from inference_service.backends.triton import TritonLora, TritonOperations
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence
from inference_service.engine.graph_runner import GraphRunner
from inference_service.engine.graphs import Graph, Recorder
from inference_service.engine.queues import SchedulerLimits
from inference_service.engine.runner import Runner
from inference_service.engine.tape import CaptureRefused, Tape, TapeRecorder
from inference_service.lora.places import taken_by
from inference_service.models.decoder import Decoder

RANK: Final = 16
CEILING: Final = 64
"""Largest rank that the bank was opened for: the default."""
BLOCK_SIZE: Final = 16
STEPS: Final = 20
EAGER_STEPS: Final = 5
RESERVE_BYTES: Final = 6 * 2**30
"""Bytes of the device that are left to activations, graphs and workspaces."""


@dataclass(frozen=True)
class Plan:
    """The steps to run."""

    shape: dict[str, Any]
    loaded: tuple[int, ...]
    """Adapters, level by level."""
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    few: int
    """Adapters of a step where many more are loaded."""
    prompts: tuple[int, ...]
    """Rows of a prompt in a step that decodes too."""
    drafted: int
    """Tokens of a draft, in the smallest batch."""


FULL: Final = Plan(
    LLAMA_8B, (0, 1, 8, 16, 64), (1, 8, 20, 32, 64, 100, 128), (512, 4096), 8, (64, 448, 2048), 7
)
QUICK: Final = Plan(LLAMA_8B, (0, 8, 64), (1, 32), (512,), 8, (448,), 7)
REHEARSAL: Final = Plan(TINY, (0, 2), (2,), (20,), 1, (5,), 1)
PENALTY: Final = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1)


@dataclass(frozen=True)
class Point:
    """A step of so many rows, of which each takes one of the active adapters in turn; 0 active: base rows."""

    loaded: int
    active: int
    batch: int
    context: int
    prompt: int = 0
    """Rows of a prompt, which is the base's, in the same step."""
    penalised: int = 0
    """Rows whose tokens are drawn with penalties."""
    drafted: int = 0
    """Tokens that prompt lookup drafted behind each row, and that the same step verifies."""


@dataclass
class TimedRecorder:
    """Records graphs whose replays are marked on the device."""

    device: Device
    inner: Recorder
    marks: list[tuple[Any, Any]] = field(default_factory=list)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record."""
        return _Timed(self.inner.capture(work), self)

    def taken_us(self) -> list[float]:
        """Times of the replays since the last call."""
        self.device.wait()
        taken = [self.device.between_us(begin, end) for begin, end in self.marks]
        self.marks.clear()
        return taken


@dataclass(frozen=True)
class _Timed:
    graph: Graph
    recorder: TimedRecorder

    def replay(self) -> None:
        begin = self.recorder.device.mark()
        self.graph.replay()
        self.recorder.marks.append((begin, self.recorder.device.mark()))


class Steps:
    """The model, its adapters, and the figures of the engine without any."""

    def __init__(self, run: Run, plan: Plan) -> None:
        self._run, self._plan, self._device = run, plan, run.device
        self._config = config_of(plan.shape)
        dims, where, dtype = self._config.dims, run.device.where, run.device.dtype
        operations = TritonOperations(self._config.heads, dtype, where)
        self._model = Decoder(self._config, RandomTensors(dtype, where), operations)
        self._lora = TritonLora(self._config.groups, dims.num_layers, dtype, where)
        self._adapter = self._lora.pack(random_adapter(self._config, RANK, dtype))
        self._entered = 0
        most = max(plan.loaded)
        self._lora.open(most * taken_by(self._adapter.num_bytes), CEILING, most)
        self._bytes_per_token = (
            2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * torch.finfo(dtype).bits // 8
        )
        self._base: dict[Point, float] = {}

    def measure(self) -> None:
        """Load more adapters level by level; at each, build an engine's runner and time its steps."""
        for loaded in self._plan.loaded:
            while self._entered < loaded:
                offset = self._entered * taken_by(self._adapter.num_bytes)
                self._lora.copy(self._adapter, offset)
                self._lora.enter(self._entered, offset, self._adapter)
                self._entered += 1
            if self._run.left_s <= 0:
                self._run.note(f"out of time before {loaded} adapters were measured")
                return
            self._level(loaded)
            gc.collect()
            if self._device.where.type == "cuda":
                torch.cuda.empty_cache()

    def _level(self, loaded: int) -> None:
        points = self._points(loaded)
        if not points:
            return
        launches = self._launches()
        recorder = TimedRecorder(self._device, self._device.recorder())
        most = max(_blocks(point) for point in points)
        rows = max(self._plan.batches) + max(self._plan.prompts)
        seqs = max(self._plan.batches) + 1 + self._plan.drafted
        runner = self._runner(most, seqs, recorder, rows)
        # Before anything is recorded, the runner launches every step from Python.
        eager = {point: self._drive(runner, point, EAGER_STEPS) for point in points if self._run.left_s > 0}
        runner.capture()
        recorder.taken_us()

        def measure(point: Point) -> None:
            wall = self._drive(runner, point, STEPS)
            graph = statistics.median(recorder.taken_us())
            bare = replace(point, loaded=0, active=0)
            if not loaded:
                self._base[bare] = graph
            base = self._base.get(bare)
            self._run.add(
                asdict(point),
                {
                    "graph us": graph,
                    OF_BASE: None if base is None else base / graph,
                    "step us": wall,
                    "eager us": eager.get(point, math.nan),
                    "tokens/s": point.batch / wall * 1e6,
                    "launches": launches[point.active > 0],
                },
            )

        self._run.each(points, measure)

    def _points(self, loaded: int) -> list[Point]:
        """All that fit the device; and base rows beside the most adapters."""
        points = []
        for context in self._plan.contexts:
            for batch in self._plan.batches:
                point = Point(loaded, min(loaded, batch), batch, context)
                if not self._fits(point):
                    self._run.note(f"the cache of {point} does not fit")
                    continue
                points.append(point)
                if loaded == max(self._plan.loaded):
                    points.append(replace(point, active=0))
                    points += [replace(point, active=self._plan.few)] if point.active > self._plan.few else []
        usual = [
            point for point in points if point.batch == self._usual and point.context == self._plan.contexts[0]
        ]
        for point in usual:
            longer = [replace(point, prompt=prompt) for prompt in self._plan.prompts]
            points += [each for each in longer if self._fits(each)]
            points.append(replace(point, penalised=point.batch // 2))
        smallest = min(self._plan.batches), self._plan.contexts[0]
        alone = [point for point in points if point == Point(loaded, point.active, *smallest)]
        return points + [replace(point, drafted=self._plan.drafted) for point in alone]

    @property
    def _usual(self) -> int:
        """The batch beside which prompts and penalties are measured."""
        return min(self._plan.batches, key=lambda batch: abs(batch - 32))

    def _fits(self, point: Point) -> bool:
        if self._device.where.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self._device.where)
        return self._bytes_per_token * BLOCK_SIZE * _blocks(point) < free - RESERVE_BYTES

    def _runner(self, num_blocks: int, max_seqs: int, recorder: Recorder, most_rows: int) -> GraphRunner:
        longest = max(*self._plan.contexts, *self._plan.prompts) + self._plan.drafted
        limits = SchedulerLimits(
            max_tokens=most_rows, max_seqs=max_seqs, max_adapters=max_seqs, max_seq_len=longest
        )
        return GraphRunner(self._model, self._lora, num_blocks, BLOCK_SIZE, limits, recorder)

    def _launches(self) -> dict[bool, int | None]:
        """Launches of a step of one row, with adapters and without, as a tape counts them."""
        recorder = _Tapes()
        try:
            self._runner(_blocks(Point(0, 0, 1, max(self._plan.contexts))), 1, recorder, most_rows=1).capture()
        except CaptureRefused as refusal:  # nothing that is timed needs a tape
            self._run.note(f"launches are not counted: {refusal}")
            return {True: None, False: None}
        counts = [len(tape.names) for tape in recorder.tapes[-2:]]
        return {True: max(counts), False: min(counts)}

    def _drive(self, runner: Runner, point: Point, steps: int) -> float:
        """Microseconds of a step on the host's clock, the next one submitted before the last is waited for."""
        batch = _batch(point)
        steps = 1 if self._device.rehearses else steps
        pending = runner.submit(batch)
        pending.tokens()
        self._device.wait()
        walls = []
        pending = runner.submit(batch)
        for _ in range(steps):
            begin = self._device.now_s()
            following = runner.submit(batch)
            pending.tokens()
            walls.append((self._device.now_s() - begin) * 1e6)
            pending = following
        pending.tokens()
        return statistics.median(walls)


class _Tapes:
    """Keeps the tapes."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self._inner = TapeRecorder()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record, and keep."""
        self.tapes.append(self._inner.capture(work))
        return self.tapes[-1]


def run(run: Run) -> None:
    """Time every level and point."""
    (plan,) = run.choose((FULL,), (QUICK,), (REHEARSAL,))
    Steps(run, plan).measure()


@cache
def _adapter(slot: int) -> Adapter:
    return Adapter(f"{slot:064x}", slot)


def _blocks(point: Point) -> int:
    return point.batch * -(-(point.context + point.drafted) // BLOCK_SIZE) + -(-point.prompt // BLOCK_SIZE)


def _batch(point: Point) -> Batch:
    """Sequences of one context, all of it but the last token in the cache, whose blocks are scattered."""
    each = -(-(point.context + point.drafted) // BLOCK_SIZE)
    order = array("i", torch.randperm(_blocks(point)).tolist())
    chunks = []
    if point.prompt:
        prompt = Sequence("prompt", [2] * point.prompt, SamplingParams())
        prompt.progress.blocks = order[point.batch * each :]
        chunks.append(Chunk(prompt, point.prompt))
    for row in range(point.batch):
        slot = row % point.active if point.active else None
        adapter = None if slot is None else _adapter(slot)
        sampling = PENALTY if row < point.penalised else SamplingParams()
        seq = Sequence(str(row), [2] * point.context, sampling, adapter)
        seq.progress.blocks, seq.progress.num_computed = order[row * each : (row + 1) * each], point.context - 1
        chunks.append(Chunk(seq, 1 + point.drafted, point.drafted))
    drafts = {chunk.seq: [2] * chunk.drafted for chunk in chunks if chunk.drafted}
    return Batch(tuple(chunks), drafts)
