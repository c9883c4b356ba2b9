"""Waiting among the threads of a step on a CPU: awake (they spin), or asleep.

A step has hundreds of operations, behind each of which its threads meet. libgomp lets them spin while at most
of its threads live than there are cores, and sleep almost at once when more do (GOMP_SPINCOUNT, in its manual).
So threads that only live are the switch.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from loramux_shared.cores import usable_cpus

Spin = Literal["auto", "always", "never"]

LOOK_S: Final = 0.5
"""Between two looks while the threads spin: so long steps may be slow because others want the cores."""
REST_S: Final = 5.0
"""The same while they sleep: so long steps may be slower than they could be."""
CONTENDED: Final = 0.6
"""Share of a core for which threads of this process waited, from which on sleep is faster.

Measured, see docs/decisions/tried.md.
"""
FREE: Final = 0.5
"""Below, they spin again."""
ENOUGH_NS: Final = 100_000_000
"""Least work between two looks: less tells nothing."""
VALUES_A_THREAD: Final = 2**16
"""Values of an operation that torch shares among its threads."""


class IdleTeams:
    """Threads of OpenMP that do nothing, enough of them that all others sleep while they wait.

    They end with this object at the latest.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._holders: list[threading.Thread] = []
        weakref.finalize(self, self._ended.set)

    def __call__(self, *, live: bool) -> None:
        """Begin them, or end them; nothing happens where that is so already."""
        if live and not self._holders:
            self._begin()
        elif not live:
            self._ended.set()
            while self._holders:
                self._holders.pop().join()
            self._ended.clear()

    def _begin(self) -> None:
        """Let threads be that each have a team: it lives as long as they do."""
        threads = torch.get_num_threads()
        count = (len(usable_cpus()) - 1) // (threads - 1) if threads > 1 else 0
        made = threading.Barrier(count + 1)
        for _ in range(count):
            holder = threading.Thread(target=_hold, args=(threads, made, self._ended), daemon=True)
            self._holders.append(holder)
            holder.start()
        made.wait()


def _hold(threads: int, made: threading.Barrier, ended: threading.Event) -> None:
    torch.zeros(threads * VALUES_A_THREAD).add_(1)
    made.wait()
    ended.wait()


@dataclass(frozen=True)
class Waited:
    """Since a process began, in nanoseconds."""

    engine: int
    """Nanoseconds that the engine's thread ran, or waited for a core."""
    everybody: dict[str, int]
    """Nanoseconds that each thread waited for a core."""

    def share_since(self, before: Waited) -> float:
        """Cores that threads of this process waited for, while the engine's thread had work."""
        waited = sum(max(0, ns - before.everybody.get(name, 0)) for name, ns in self.everybody.items())
        return waited / (self.engine - before.engine)


class Spinning:
    """Lets threads spin; with ``auto`` not while other work wants the cores. `look` belongs behind each step.

    A spinning thread holds a core, which the other thread of its step may be waiting for. How long threads wait
    for a core is what the kernel counts of each (schedstat), whether they spin or sleep. Where it does not,
    they sleep.
    """

    def __init__(
        self,
        spin: Spin,
        switch: Callable[..., None] | None = None,
        tasks: Path = Path("/proc/self/task"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin. The switch, `IdleTeams` unless given, takes ``live``: whether threads are to sleep."""
        self._switch = switch or IdleTeams()
        self._tasks = tasks
        self._clock = clock
        self._asleep = spin == "never"
        self._switch(live=self._asleep)
        self._due_s = clock() + LOOK_S if spin == "auto" else math.inf
        self._before: Waited | None = None

    def look(self) -> None:
        """Look, when it is time, how long threads waited for a core; on the engine's thread."""
        if self._clock() < self._due_s:
            return
        now, before = self._read(str(threading.get_native_id())), self._before
        if now is None:
            self._sleep(asleep=True)
        elif before is None:
            self._before = now
        elif now.engine - before.engine > ENOUGH_NS:
            self._sleep(asleep=now.share_since(before) > (FREE if self._asleep else CONTENDED))
            self._before = now
        self._due_s = self._clock() + (REST_S if self._asleep else LOOK_S)

    def _sleep(self, *, asleep: bool) -> None:
        self._asleep = asleep
        self._switch(live=asleep)

    def _read(self, engine: str) -> Waited | None:
        found = dict(self._read_all())
        if engine not in found:
            return None
        return Waited(sum(found[engine]), {name: waited for name, (_, waited) in found.items()})

    def _read_all(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield of each thread for how long it ran, and waited for a core."""
        for folder in self._tasks.glob("*"):
            with suppress(OSError, ValueError):  # the thread has ended, or the kernel does not count
                ran, waited, _ = (folder / "schedstat").read_text().split()
                yield folder.name, (int(ran), int(waited))
