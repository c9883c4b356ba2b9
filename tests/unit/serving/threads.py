"""Threads of engines with scripted steps."""

import itertools
import math
import threading
from collections.abc import Callable

from inference_service.core.sampling import SamplingParams
from inference_service.core.sequence import Batch, EndReason, Sequence, StepOutput, Token
from inference_service.driver.delivery import Outputs
from inference_service.driver.engine_thread import EngineThread
from inference_service.engine.engine import Engine
from inference_service.engine.execution.runner import Pending
from inference_service.engine.scheduling.block_manager import BlockManager
from inference_service.engine.scheduling.queues import SchedulerLimits
from inference_service.engine.scheduling.residents import Residents
from tests.support.waiting import BOUND_S, bounded

_ids = itertools.count()


class Device:
    """A runner of which every sampled sequence gets one token; from a step on, steps wait until they may go."""

    def __init__(self, held_from: float = math.inf, depth: int = 0) -> None:
        self.depth = depth
        self.steps = 0
        self.held_from = held_from
        self.go = threading.Event()
        self.before_step: Callable[[Batch], object] = lambda _: None
        self.prompts: list[int] = []
        """Tokens of those that began."""

    def submit(self, batch: Batch) -> Pending:
        self.steps += 1
        self.prompts += [chunk.length for chunk in batch.chunks if not chunk.seq.progress.num_computed]
        self.before_step(batch)
        if self.steps >= self.held_from:
            assert self.go.wait(BOUND_S), "a step was never let go"
        seqs = tuple(chunk.seq for chunk in batch.chunks if chunk.samples)
        return Pending(seqs, lambda: [Token(7)] * len(seqs))


class Threads:
    """Makes threads, and ends them."""

    def __init__(self) -> None:
        self._made: list[tuple[Device, EngineThread]] = []
        self.why: str | None = None
        """The reason for which the threads ended, where a test lets them fail."""

    def make(
        self, device: Device, max_queue: int = 8, seqs: int = 8, blocks: int = 64, **options: float
    ) -> EngineThread:
        """Return one that has not been started; its probe runs a step."""
        limits = SchedulerLimits(max(64, 4 * seqs), seqs, max_adapters=1, max_seq_len=64, watermark=0.0)
        engine = Engine(device, limits, BlockManager(blocks, 4), Residents())

        def probe() -> None:
            engine.add(Sequence("probe", [0], SamplingParams(max_tokens=1)))
            while not engine.idle:
                engine.step()

        thread = EngineThread(engine, max_queue, probe, **({"step_timeout_s": 600.0} | options))
        self._made.append((device, thread))
        return thread

    def start(self, device: Device, **options: float) -> EngineThread:
        thread = self.make(device, **options)  # type: ignore[arg-type]
        thread.start()
        return thread

    async def end(self) -> None:
        """Let steps go, and end all threads, which were started."""
        for device, thread in self._made:
            device.go.set()
            assert await thread.stop() == self.why


def submit(
    thread: EngineThread,
    prompt: int = 3,
    new: int = 2,
    deadline_s: float | None = None,
    n: int = 1,
    key_id: str = "",
) -> Outputs:
    fields = {"sampling": SamplingParams(max_tokens=new), "deadline_s": deadline_s, "key_id": key_id}
    return thread.submit([Sequence(f"{next(_ids)}", [5] * prompt, **fields) for _ in range(n)])


async def following(outputs: Outputs) -> list[StepOutput]:
    """Return the next outputs of a request, those of its first sequence first."""
    return [output for arrived in (await outputs.get()).values() for output in arrived]


async def end(outputs: Outputs) -> EndReason:
    async with bounded("the end of a sequence"):
        while True:
            for output in await following(outputs):
                if output.finish is not None:
                    outputs.close()
                    return output.finish
