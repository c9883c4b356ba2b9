"""The engine's thread with its inbox, and the only bridge between it and the event loop."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence as Seq
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from inference_service.core.sequence import EndReason, Sequence, StepOutput
from inference_service.driver.delivery import SLICE, Delivery, Outputs
from inference_service.driver.watchdog import Watchdog
from loramux_shared.access.shares import is_in_share
from loramux_shared.faults import Fault, QueueFull, ReplicaFailed, ReplicaPaused, ShuttingDown
from loramux_shared.rpc.stopping import shielded

if TYPE_CHECKING:  # which would import torch
    from inference_service.engine.engine import Engine, EngineStats, Inspection, SequenceCounts

T = TypeVar("T")
Command = Callable[[], None]


class Inbox:
    """Commands in the order in which they came; any thread may post."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def post(self, command: Command) -> None:
        """Have something done on the thread that receives."""
        self._commands.put(command)

    def close(self) -> None:
        """Let the thread end when it has done what was posted before."""
        self._commands.put(None)

    def receive(self, wait_s: float = math.inf) -> bool:
        """Do what was posted, or is within so many seconds; True when the thread is to end."""
        try:
            command = self._next(wait_s)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return False
        return True

    def _next(self, wait_s: float) -> Command | None:
        if wait_s <= 0:
            return self._commands.get_nowait()
        return self._commands.get(timeout=min(wait_s, threading.TIMEOUT_MAX))


class PauseMode(StrEnum):
    """The treatment of running requests; new ones wait in each case until the engine resumes."""

    KEEP = "keep"
    """They stand still between two steps, and continue where they were."""
    ABORT = "abort"
    """They end with REPLICA_PAUSED."""
    WAIT = "wait"
    """They run to their end first."""


ENDED: Final = (
    "an operator paused the replica and ended all running requests. Retry, here or with another replica."
)
LOOK_S: Final = 0.02
"""Between two looks at whether those that were under way have ended."""


Deferred = dict[str, Sequence]
"""First sequences of requests that came while those before them run to their ends, by their ids."""


def take_expired(deferred: Deferred, now_s: float) -> list[Sequence]:
    """Take out those whose deadline has passed."""
    late = [seq for seq in deferred.values() if seq.deadline_s is not None and seq.deadline_s <= now_s]
    for seq in late:
        del deferred[seq.id]
    return late


CUT: Final = "the server shut down before the answer was complete. Retry with another replica."
PROBE_PAUSES_S: Final = (0.0, 0.5)
"""Before each attempt to find out whether the engine still works: memory that others hold may come back."""

log = structlog.get_logger()


@dataclass(frozen=True)
class SequenceView:
    """The progress with a sequence of this process."""

    seq: Sequence

    @property
    def num_cached(self) -> int:
        """Return the tokens of the prompt that the prefix cache held."""
        return self.seq.progress.num_cached

    @property
    def began_s(self) -> float | None:
        """Return when the first step for it was submitted."""
        return self.seq.progress.began_s

    @property
    def failure(self) -> str:
        """Return why its constraint could not be followed; empty while it could."""
        return "" if self.seq.grammar is None else self.seq.grammar.failure


Meter = Callable[[int], None]
MakeOutputs = Callable[[Seq[Sequence], Callable[[str], None], Meter | None], Outputs]
"""Makes the outputs of sequences; it is given what to call with the id of each that is let go, and with the
numbers of tokens that come.
"""


def plain_outputs(seqs: Seq[Sequence], on_close: Callable[[str], None], meter: Meter | None) -> Outputs:
    """Return outputs that a task of this process reads."""
    return Outputs({seq.id: SequenceView(seq) for seq in seqs}, on_close, meter)


class EngineThread:
    """Runs steps while there is work; hands every output to the stream of its sequence.

    Every sequence that was submitted ends once: with an output that has a finish reason, with a fault, or when
    it is dropped. After a step that raised the probe runs steps that are known to work: where it fails too, or
    a step takes longer than step_timeout_s, the engine has failed, and `ended` returns why. Else the sequences
    of the step run again, in halves, until the one is found that it raises for: that one ends, and the others
    go on. Outputs are handed over together every interval_s, because an API that wakes up for every token takes
    the cores from the steps; the first and the last of a sequence go at once. With them goes all that waits,
    unless there are so many streams that some would always begin or end: see `Delivery`.
    """

    def __init__(
        self,
        engine: Engine,
        max_queue: int,
        probe: Callable[[], None],
        *,
        step_timeout_s: float,
        interval_s: float = 0.0,
        inbox: Inbox | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._after_step = after_step
        self._probe = probe
        self._step_timeout_s = step_timeout_s
        self.max_queue = max_queue
        self._interval_s = interval_s
        self._pending: dict[str, list[StepOutput]] = {}
        """Outputs by the ids of sequences."""
        self._sent_s = 0.0
        self._delivery = Delivery()
        self.inbox = inbox or Inbox()
        self._streams: dict[str, Outputs] = {}
        self._later: dict[Outputs, Seq[Sequence]] = {}
        """Sequences that wait for the first token of their request's first one."""
        self._under_way: dict[str, Sequence] = {}
        """Sequences of streams that have not ended, for all that is known here."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[str | None] | None = None
        self._before_cut: Callable[[], Awaitable[None]] | None = None
        self._stopped: Fault | None = None
        self._ending: asyncio.Task[None] | None = None
        self._deferred: Deferred | None = None
        self._pausing = False
        self._resting = False
        """The thread's own copy of it."""
        self._rested: list[Callable[[], None]] = []

    @property
    def paused(self) -> bool:
        """True from a call of `pause` to the next one of `resume`."""
        return self._pausing

    @property
    def num_open(self) -> int:
        """Return the number of sequences that nobody has let go."""
        return len(self._streams)

    @property
    def stats(self) -> EngineStats:
        """A snapshot; numbers may be one step old."""
        return self._engine.stats

    @property
    def sequence_counts(self) -> SequenceCounts:
        """Return the numbers of running and waiting sequences."""
        return self._engine.sequence_counts

    async def inspect(self) -> Inspection | None:
        """Return what the engine holds between two steps; None once its thread has ended."""
        found: asyncio.Future[Inspection] = asyncio.get_running_loop().create_future()

        def look() -> None:
            self._call_on_loop(partial(_settle, found, self._engine.inspect()))

        self.inbox.post(look)
        await self._until_done(found)
        return found.result() if found.done() else None

    def start(self, on_failure: Callable[[], Awaitable[None]] | None = None) -> None:
        """Start the thread; must be called on the event loop.

        When the engine fails, on_failure is awaited before requests get their fault: there health ends.
        """
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._before_cut = on_failure
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def ended(self) -> str | None:
        """Wait until the thread ends; return the failure, or None when it was stopped."""
        assert self._ended is not None  # noqa: S101 - it was started
        return await shielded(self._ended)

    def cut(self, fault: Fault | None = None) -> None:
        """End every open stream with a fault, SHUTTING_DOWN by default, and refuse new ones."""
        self._stopped = self._stopped or fault or ShuttingDown(CUT)
        for outputs in set(self._streams.values()):
            outputs.fail(self._stopped.copy())

    def fail(self, why: str) -> None:
        """End as a failed engine does, whatever the thread waits for; on any thread, once it was started."""
        self._end(why)

    async def stop(self) -> str | None:
        """End the thread after the step in progress, and what is open; return what `ended` does."""
        self.cut()
        self.inbox.close()
        return await self.ended()

    def submit(
        self, seqs: Seq[Sequence], make: MakeOutputs = plain_outputs, meter: Meter | None = None
    ) -> Outputs:
        """Put the sequences of a request in the queue; the caller must close what it gets, which make makes.

        They have the same prompt: all but the first go to the engine when the first has its first token, and
        find the prompt in the prefix cache.

        Raises:
            QueueFull: too many sequences wait, or the API key has its share of those that may.
            ShuttingDown: the engine was stopped.
            ReplicaFailed: the engine failed.
        """
        if self._stopped is not None:
            raise self._stopped.copy()
        self._require_room(seqs)
        outputs = make(seqs, self._close, meter)
        self._streams |= {seq.id: outputs for seq in seqs}
        if len(seqs) > 1:
            self._later[outputs] = seqs[1:]
        self._under_way |= {seq.id: seq for seq in seqs}
        self._delivery.came = True
        if self._deferred is not None:
            self._deferred[seqs[0].id] = seqs[0]
        else:
            self._begin(seqs[0])
        return outputs

    def _require_room(self, new: Seq[Sequence]) -> None:
        """Refuse sequences that would wait behind a full queue.

        Those that no step has seen wait only where there are more of them than free seats. A step may find no
        blocks for some; while it leaves as many as the queue holds, nobody is let in for a seat.
        """
        stats = self._engine.stats
        unseated = len(self._under_way) + len(new) - stats.running
        free = max(0, stats.seats - stats.running) if stats.left < self.max_queue else 0
        waiting = min(unseated, max(stats.left, unseated - free))
        if waiting > self.max_queue:
            raise QueueFull(f"{self.max_queue} requests wait already. Retry in a moment, or add a replica.")
        key_id = new[0].key_id
        if not key_id or not waiting:
            return
        unseated_of_keys = Counter(
            seq.key_id for seq in self._under_way.values() if seq.progress.began_s is None
        )
        unseated_of_keys[key_id] += len(new) - 1
        places = (
            self.max_queue + unseated_of_keys.total() + 1 - waiting
        )  # with the free seats that some of them find
        if not is_in_share(key_id, unseated_of_keys, places):
            raise QueueFull(
                f"requests of the API key {key_id!r} have its share of the {self.max_queue} that may wait. "
                "Retry in a moment, or add a replica."
            )

    async def pause(self, mode: PauseMode = PauseMode.KEEP) -> None:
        """Pause all sequences, and return when no step is running; new requests wait.

        Deadlines pass meanwhile, and cancelled sequences are freed. `resume` continues all the others.
        """
        self._pausing = True
        if mode is PauseMode.ABORT:
            for outputs in set(self._streams.values()):
                outputs.fail(ReplicaPaused(ENDED))
        elif mode is PauseMode.WAIT and not self._resting:
            await self._until_ended()
        if self._pausing and self._stopped is None:
            rested = asyncio.get_running_loop().create_future()
            self.inbox.post(partial(self._begin_rest, rested))
            await self._until_done(rested)

    async def _until_done(self, future: asyncio.Future[Any]) -> None:
        """Wait for a future that the thread sets, or for the end of the thread."""
        ended = asyncio.ensure_future(self.ended())
        await asyncio.wait({future, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()

    def resume(self) -> None:
        """Resume; does nothing if the engine is not paused."""
        self._pausing = False
        self._begin_deferred()
        self.inbox.post(self._end_rest)

    async def _until_ended(self) -> None:
        """Wait until the requests that are under way have ended; hold those back that come meanwhile."""
        deferred = self._deferred = {} if self._deferred is None else self._deferred
        while self._deferred is deferred and self._has_others(deferred) and self._stopped is None:
            for seq in take_expired(deferred, time.monotonic()):
                self._deliver({seq.id: [StepOutput(seq.id, None, EndReason.DEADLINE)]})
            await asyncio.sleep(LOOK_S)
        self._begin_deferred()

    def _has_others(self, deferred: Deferred) -> bool:
        """Return True if a request is open that is not held back; one that is may have several sequences."""
        waiting = {self._streams[seq_id] for seq_id in deferred}
        return not waiting.issuperset(self._streams.values())

    def _begin_deferred(self) -> None:
        deferred, self._deferred = self._deferred, None
        for seq in (deferred or {}).values():
            self._begin(seq)

    def _begin_rest(self, rested: asyncio.Future[None]) -> None:
        self._resting = True
        self._rested.append(partial(_settle, rested, None))

    def _end_rest(self) -> None:
        self._resting = False

    def _begin(self, seq: Sequence) -> None:
        if self._stopped is None:
            self.inbox.post(partial(self._engine.add, seq))

    def _close(self, seq_id: str) -> None:
        outputs = self._streams.pop(seq_id)
        if not outputs.open:
            self._later.pop(outputs, None)
        if self._deferred is not None:
            self._deferred.pop(seq_id, None)
        if seq_id in self._under_way:  # else it ended by itself, and the thread need not wake
            del self._under_way[seq_id]
            self.inbox.post(partial(self._engine.abort, seq_id))

    def _run(self) -> None:
        late = f"a step did not end within LORAMUX_STEP_TIMEOUT_S={self._step_timeout_s:g}"
        watchdog = Watchdog(self._step_timeout_s, partial(self._end, late))
        watchdog.start()
        try:
            why = self._work(watchdog)
        except Exception:  # a bug outside a step: no other code would end the requests
            log.exception("engine thread failed")
            why = "its thread failed"
        watchdog.stop()
        self._end(why)

    def _work(self, watchdog: Watchdog) -> str | None:
        """Run steps until the thread is to end; return why where that is a failure."""
        while True:
            until_s = self._engine.resting_until_s if self._resting else self._engine.idle_until_s
            if self.inbox.receive(until_s - time.monotonic()):
                return None
            with watchdog:
                try:
                    outputs = self._engine.rest() if self._resting else self._engine.step()
                except Exception as error:  # every request must end, whatever a step raised
                    log.exception("engine step failed", running=self._engine.stats.running)
                    outputs = self._engine.set_aside()
                    if not self._recovers():
                        return f"every engine step fails since a {type(error).__name__}"
                    self._engine.retry()
            self._send(outputs)
            self._notify_rested()
            if self._after_step is not None:
                self._after_step()

    def _notify_rested(self) -> None:
        rested, self._rested = self._rested, []
        for tell in rested:
            self._call_on_loop(tell)

    def _call_on_loop(self, call: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    def _recovers(self) -> bool:
        """Return True if a step that works normally still does: errors of a CUDA context stay for the life of a
        process.
        """
        for pause_s in PROBE_PAUSES_S:
            time.sleep(pause_s)
            try:
                self._probe()
            except Exception:  # the probe failed, whatever it raised
                log.exception("probe failed after a failed step")
                self._engine.fail_all()
            else:
                return True
        return False

    def _end(self, why: str | None) -> None:
        self._call_on_loop(partial(self._on_end, why))

    def _on_end(self, why: str | None) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._finish(why))

    async def _finish(self, why: str | None) -> None:
        """Notify health first, then the requests, then those that wait for the end."""
        assert self._ended is not None  # noqa: S101 - it was started
        try:
            if why is not None and self._before_cut is not None:
                await self._before_cut()
        finally:
            if why is not None:
                self.cut(ReplicaFailed(f"the replica failed: {why}. Retry with another replica."))
            self._ended.set_result(why)

    def _send(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            self._pending.setdefault(output.seq_id, []).append(output)
        now = time.monotonic()
        urgent = {output.seq_id for output in outputs if output.first or output.finish}
        together = self.num_open <= SLICE and bool(urgent)
        at_rest = self._resting or self._engine.idle_until_s > now
        if together or at_rest or now - self._sent_s >= self._interval_s:
            sent, self._pending, self._sent_s = self._pending, {}, now
        else:
            sent = {seq_id: self._pending.pop(seq_id) for seq_id in urgent}
        if sent:
            self._call_on_loop(partial(self._deliver, sent))

    def _deliver(self, sent: Mapping[str, list[StepOutput]]) -> None:
        paced = self.num_open > SLICE
        for seq_id, outputs in sent.items():
            stream = self._streams.get(seq_id)
            if stream is None:
                continue
            if outputs[-1].finish is not None:
                self._under_way.pop(seq_id, None)
            stream.put(seq_id, outputs)
            for seq in self._later.pop(stream, ()):
                self._begin(seq)
            if paced and stream.paced:
                self._delivery.add(stream, urgent=outputs[0].first or outputs[-1].finish is not None)
            else:
                stream.wake()
        self._delivery.begin()


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)
