"""The engine's thread, and the only bridge between it and the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Final

import structlog

from inference_service.core.sequence import Sequence, StepOutput
from inference_service.engine.engine import Crowd, Engine, EngineStats
from loramux_shared.faults import Fault, QueueFull, ShuttingDown

CUT: Final = "the server shut down before the answer was complete. Retry with another replica."

log = structlog.get_logger()


class Outputs:
    """The outputs of the sequences of one request, as they come; used on the event loop only."""

    def __init__(self, seqs: Seq[Sequence], on_close: Callable[[str], None]) -> None:
        self._open = {seq.id for seq in seqs}
        self._later = list(seqs[1:])
        self._on_close = on_close
        self._waiting: list[StepOutput] = []
        self._arrived = asyncio.Event()
        self._failure: Fault | None = None

    def put(self, output: StepOutput) -> list[Sequence]:
        """Hand over an output; return the sequences that were to wait for it."""
        self._waiting.append(output)
        self._arrived.set()
        later, self._later = self._later, []
        return later

    async def get(self) -> list[StepOutput]:
        """Wait for the next outputs; there are none behind the last one with a finish reason.

        Raises:
            Fault: that of `fail`.
        """
        await self._arrived.wait()
        if self._failure is not None:
            raise self._failure
        self._arrived.clear()
        outputs, self._waiting = self._waiting, []
        return outputs

    def fail(self, fault: Fault) -> None:
        """End with a fault what has not ended yet."""
        self._failure = fault
        self._arrived.set()

    def drop(self, seq_id: str) -> None:
        """Let one sequence go; when it has not ended yet, it is freed at the next step."""
        if seq_id in self._open:
            self._open.remove(seq_id)
            self._on_close(seq_id)

    def close(self) -> None:
        """Let all sequences go."""
        for seq_id in tuple(self._open):
            self.drop(seq_id)


class EngineThread:
    """Runs steps while there is work; hands every output to the stream of its sequence.

    Every sequence that was submitted ends once: with an output that has a finish reason, with a fault, or when
    it is dropped.
    Outputs are handed over together every interval_s, because a door that wakes up for every token takes the
    cores from the steps; the first and the last of a sequence go at once, with all that wait.
    """

    def __init__(self, engine: Engine, max_queue: int, interval_s: float = 0.0) -> None:
        self._engine = engine
        self.max_queue = max_queue
        self._interval_s = interval_s
        self._pending: list[StepOutput] = []
        self._sent_s = 0.0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, Outputs] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = False

    @property
    def stats(self) -> EngineStats:
        """A snapshot; numbers may be one step old."""
        return self._engine.stats

    @property
    def crowd(self) -> Crowd:
        """Who runs and who waits."""
        return self._engine.crowd

    def start(self) -> None:
        """Start the thread; must be called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def cut(self) -> None:
        """End every open stream with SHUTTING_DOWN, and take no more."""
        self._stopped = True
        for outputs in set(self._streams.values()):
            outputs.fail(ShuttingDown(CUT))

    async def stop(self) -> None:
        """End the thread after the step in progress, and what is open."""
        self.cut()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, seqs: Seq[Sequence]) -> Outputs:
        """Put the sequences of a request in the queue; the caller must close what it gets.

        They have the same prompt: all but the first go to the engine when the first has its first token, and
        find the prompt in the prefix cache.

        Raises:
            QueueFull: too many sequences wait.
            ShuttingDown: the engine was stopped.
        """
        if self._stopped:
            raise ShuttingDown("the engine has stopped. Retry with another replica.")
        if len(self._streams) + len(seqs) - self._engine.stats.running > self.max_queue:
            raise QueueFull(f"{self.max_queue} requests wait already. Retry in a moment, or add a replica.")
        outputs = Outputs(seqs, self._close)
        self._streams |= {seq.id: outputs for seq in seqs}
        self._begin(seqs[0])
        return outputs

    def _begin(self, seq: Sequence) -> None:
        if not self._stopped:
            self._inbox.put(partial(self._engine.add, seq))

    def _close(self, seq_id: str) -> None:
        del self._streams[seq_id]
        self._inbox.put(partial(self._engine.abort, seq_id))

    def _run(self) -> None:
        while True:
            stop = self._receive(wait=self._engine.idle)
            if stop:
                self._send(self._engine.fail_all())
                return
            try:
                outputs = self._engine.step()
            except Exception:  # every request must end, whatever a step raised
                log.exception("step failed", running=self._engine.stats.running)
                outputs = self._engine.fail_all()
            self._send(outputs)

    def _receive(self, *, wait: bool) -> bool:
        """Take what arrived; True when the thread is to end."""
        try:
            command = self._inbox.get(block=wait)
            while command is not None:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return False
        return True

    def _send(self, outputs: list[StepOutput]) -> None:
        self._pending += outputs
        now = time.monotonic()
        urgent = any(output.first or output.finish for output in outputs)
        if not self._pending or not (urgent or now - self._sent_s >= self._interval_s):
            return
        pending, self._pending, self._sent_s = self._pending, [], now
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, pending)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.seq_id)
            for seq in stream.put(output) if stream is not None else ():
                self._begin(seq)
