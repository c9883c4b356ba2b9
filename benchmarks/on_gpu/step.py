"""A recorded step of a model of 8B's shape: with adapters, prompts, penalties and drafts."""

import gc
import statistics
from array import array
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Final

import torch
from torch.profiler import profile

from benchmarks.on_gpu.model import LLAMA_8B, TINY, RandomTensors, config_of, random_adapter
from benchmarks.on_gpu.run import OF_BASE, Run
from inference_service.core.adapter import Adapter
from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, Chunk, Sequence
from inference_service.engine.backends.triton import TritonOperations
from inference_service.engine.backends.triton_lora import TritonLora
from inference_service.engine.execution.graph_runner import GraphRunner
from inference_service.engine.lora.places import taken_by
from inference_service.engine.models.decoder import Decoder
from inference_service.engine.scheduling.queues import SchedulerLimits

RANK: Final = 16
CEILING: Final = 64
"""Largest rank that the bank was opened for, and adapters of a step at most: the defaults."""
BLOCK_SIZE: Final = 16
STEPS: Final = 20
MOST: Final = 12
"""Kernels whose times are noted."""
RESERVE_BYTES: Final = 6 * 2**30
"""Bytes of the device that are left to activations, graphs and workspaces."""
PENALTY: Final = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1)


@dataclass(frozen=True)
class Plan:
    """The steps to run."""

    shape: dict[str, Any]
    loaded: tuple[int, ...]
    """Adapters, level by level."""
    batches: tuple[int, ...]
    """Sequences that decode; some lie between the sizes that are recorded."""
    contexts: tuple[int, ...]
    few: int
    """Adapters of a step where many more are loaded."""
    prompts: tuple[int, ...]
    """Rows of a prompt in a step that decodes too."""
    drafted: int
    """Tokens of a draft, in the smallest batch."""


FULL: Final = Plan(
    LLAMA_8B, (0, 1, 8, 16, 64), (1, 8, 20, 32, 64, 100, 128), (512, 4096), 8, (64, 448, 1100), 7
)
REHEARSAL: Final = Plan(TINY, (0, 2), (2,), (20,), 1, (5,), 1)


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

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return self.batch * -(-(self.context + self.drafted) // BLOCK_SIZE) + -(-self.prompt // BLOCK_SIZE)

    def make(self) -> Batch:
        """Return sequences with all but the last token in the cache, whose blocks are scattered."""
        each = -(-(self.context + self.drafted) // BLOCK_SIZE)
        order = array("i", torch.randperm(self.blocks).tolist())
        chunks = []
        if self.prompt:
            prompt = Sequence("prompt", [2] * self.prompt, SamplingParams())
            prompt.progress.blocks = order[self.batch * each :]
            chunks.append(Chunk(prompt, self.prompt))
        for row in range(self.batch):
            adapter = _adapter(row % self.active) if self.active else None
            sampling = PENALTY if row < self.penalised else SamplingParams()
            seq = Sequence(str(row), [2] * self.context, sampling, adapter)
            seq.progress.blocks = order[row * each : (row + 1) * each]
            seq.progress.num_computed = self.context - 1
            chunks.append(Chunk(seq, 1 + self.drafted, self.drafted))
        drafts = {chunk.seq: [2] * chunk.drafted for chunk in chunks if chunk.drafted}
        return Batch(tuple(chunks), drafts)


@cache
def _adapter(slot: int) -> Adapter:
    return Adapter(f"{slot:064x}", slot)


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
        self._token_bytes = 2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * dtype.itemsize
        self._base: dict[Point, float] = {}

    def level(self, loaded: int) -> None:
        """Load more adapters, build an engine's runner and time its steps."""
        while self._entered < loaded:
            offset = self._entered * taken_by(self._adapter.num_bytes)
            self._lora.copy(self._adapter, offset)
            self._lora.enter(self._entered, offset, self._adapter)
            self._entered += 1
        points, plan = self._points(loaded), self._plan
        limits = SchedulerLimits(
            max_tokens=max(plan.batches) + max(plan.prompts),
            max_seqs=max(plan.batches) + 1 + plan.drafted,
            max_adapters=CEILING,
            max_seq_len=max(*plan.contexts, *plan.prompts) + plan.drafted,
        )
        blocks = max(point.blocks for point in points)
        runner = GraphRunner(self._model, self._lora, blocks, BLOCK_SIZE, limits, self._device.recorder())
        runner.capture()

        def measure(point: Point) -> None:
            step = self._drive(runner, point)
            bare = replace(point, loaded=0, active=0)
            base = self._base.setdefault(bare, step) if not loaded else self._base.get(bare)
            of_base = None if base is None else base / step
            self._run.add(asdict(point), {"us": step, OF_BASE: of_base, "tokens/s": point.batch / step * 1e6})

        self._run.each(points, measure)
        if loaded == max(plan.loaded):
            for point in [each for each in points if each.active == plan.few and not each.prompt][:1]:
                self._profile(runner, point)

    def _profile(self, runner: GraphRunner, point: Point) -> None:
        """Note which kernels take the time of a step."""
        batch = point.make()
        with profile() as kernels:
            runner.submit(batch).tokens()
            self._device.wait()
        times = [(each.self_device_time_total, each.count, each.key) for each in kernels.key_averages()]
        most = "; ".join(
            f"{key[:40]} {us:.0f} us in {count}" for us, count, key in sorted(times)[: -1 - MOST : -1]
        )
        self._run.note(f"kernels of {point}: {most}")

    def _points(self, loaded: int) -> list[Point]:
        """Return all that fit the device; and base rows beside the most adapters."""
        points, plan = list[Point](), self._plan
        for context in plan.contexts:
            for batch in plan.batches:
                point = Point(loaded, min(loaded, batch), batch, context)
                points.append(point)
                if loaded == max(plan.loaded):
                    points.append(replace(point, active=0))
                    points += [replace(point, active=plan.few)] if point.active > plan.few else []
        usual = min(plan.batches, key=lambda batch: abs(batch - 32)), plan.contexts[0]
        smallest = min(plan.batches), plan.contexts[0]
        for point in [each for each in points if each.active == min(loaded, each.batch)]:
            if (point.batch, point.context) == usual:
                points += [replace(point, prompt=prompt) for prompt in plan.prompts]
                points.append(replace(point, penalised=point.batch // 2))
            if (point.batch, point.context) == smallest:
                points.append(replace(point, drafted=plan.drafted))
        if self._device.rehearses:
            return points
        room = torch.cuda.mem_get_info(self._device.where)[0] - RESERVE_BYTES
        fitting = [point for point in points if point.blocks * BLOCK_SIZE * self._token_bytes < room]
        if len(fitting) < len(points):
            self._run.note(f"the cache of {len(points) - len(fitting)} of {len(points)} points does not fit")
        return fitting

    def _drive(self, runner: GraphRunner, point: Point) -> float:
        """Return a step's microseconds on the host's clock; each is submitted before the last has ended."""
        batch = point.make()
        runner.submit(batch).tokens()
        walls, pending = [], runner.submit(batch)
        for _ in range(1 if self._device.rehearses else STEPS):
            begin = self._device.now_s()
            following = runner.submit(batch)
            pending.tokens()
            walls.append((self._device.now_s() - begin) * 1e6)
            pending = following
        pending.tokens()
        return statistics.median(walls)


def run(run: Run) -> None:
    """Time every level and point."""
    plan = run.choose(FULL, REHEARSAL)
    steps = Steps(run, plan)

    def level(loaded: int) -> None:
        steps.level(loaded)
        gc.collect()  # the graphs of the level
        if not run.device.rehearses:
            torch.cuda.empty_cache()

    run.each(plan.loaded, level)
