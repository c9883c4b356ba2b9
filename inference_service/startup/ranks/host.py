"""The other ranks of a replica, as the engine's process sees them: started, asked, watched, and ended."""

import os
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, product
from multiprocessing.connection import Connection
from typing import Any, Final

import msgpack
import structlog

from inference_service.startup.ranks.group import SharedMemory
from loramux_shared.faults import Fault, ReplicaFailed, SettingsInvalid, fault_from
from loramux_shared.process import SOCKET, python, working_folder

log = structlog.get_logger()

MODULE: Final = "inference_service.startup.ranks.rank"
BEGIN_S: Final = 120.0
"""For the process of a rank to import torch and say the first word."""
HUNG_S: Final = 20.0
"""A rank that is silent for so long hangs."""
LOOK_S: Final = 0.5
ENDING_S: Final = 1.0
"""For the end of a process to be noticed, once an exchange with it broke off."""
HEARTBEAT_S: Final = 1.0
"""Between two words of a rank that has nothing to say."""
ENDED_S: Final = 5.0
"""For a rank to end by itself."""
DEVICES: Final = "CUDA_VISIBLE_DEVICES"


class RankHost:
    """The ranks beside the first one, each a child process; the death of one is the end of the replica.

    Steps, and adapters that enter and leave slots, go to a rank in their order over one socket, which it reads
    between steps. What takes time is asked over the other: a thread of the rank reads it at once.
    """

    def __init__(self, world: int, *, cards: int = 0, begin_s: float = BEGIN_S, hung_s: float = HUNG_S) -> None:
        """Start the processes; cards is how many GPUs there are, where ranks compute on one each.

        Raises:
            SettingsInvalid: there are fewer cards than ranks.
        """
        if 0 < cards < world:
            raise SettingsInvalid(
                f"LORAMUX_TENSOR_PARALLEL={world} (or build.tensor_parallel_count of the deployment) needs as "
                f"many GPUs, found {cards}. Set {cards}, or serve on a machine with more."
            )
        self.world = world
        self.failure: ReplicaFailed | None = None
        self._held = ExitStack()
        self.meeting = self._held.enter_context(working_folder("loramux-ranks-")) / "meeting"
        """The file by which ranks meet."""
        self.memory = SharedMemory(world)
        self._held.callback(self.memory.close)
        self._dropped: deque[int] = deque()
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._on_failure: Callable[[str], None] | None = None
        self._closed, self._failed = threading.Event(), threading.Event()
        self._begin_s = begin_s
        self.hung_s = hung_s
        """Seconds after which a silent rank hangs."""
        self._ranks = [_Rank(rank, _environment(rank, cards), self) for rank in range(1, world)]
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes."""
        return [rank.process.pid for rank in self._ranks]

    def watch(self, on_failure: Callable[[str], None]) -> None:
        """Call on_failure with the reason once a rank has failed, on any thread."""
        with self._lock:
            self._on_failure = on_failure
            failure = self.failure
        if failure is not None:
            on_failure(failure.message)

    def tell(self, name: str, *arguments: Any) -> None:
        """Have every rank do something behind what it was told before; of the engine's thread alone."""
        messages = [[name, *arguments]]
        if self._dropped:
            messages.insert(0, ["forget", [self._dropped.popleft() for _ in range(len(self._dropped))]])
        for rank, message in product(self._ranks, map(msgpack.packb, messages)):
            rank.send(rank.steps, message)

    def ask(self, name: str, *arguments: Any) -> Callable[[], list[Any]]:
        """Ask every rank for something; the result waits for all answers, and raises the first fault.

        Raises:
            Fault: that of a rank.
            ReplicaFailed: a rank failed.
        """
        answers = [rank.ask(next(self._numbers), name, arguments) for rank in self._ranks]

        def results() -> list[Any]:
            wait(answers)
            return [answer.result() for answer in answers]

        return results

    def drop(self, number: int) -> None:
        """Have every rank forget what was packed under a number, before what it is told next; on any thread."""
        self._dropped.append(number)

    def fail(self, why: str) -> None:
        """End all ranks, and let the replica end with the reason; later calls change nothing."""
        with self._lock:
            if self.failure is not None or self._closed.is_set():
                return
            self.failure = ReplicaFailed(f"{why}, so that no step can be computed. The replica ends.")
            on_failure = self._on_failure
        self._failed.set()
        self.memory.end()
        log.error("rank failed: the replica ends", why=why)
        for rank in self._ranks:
            rank.kill()
            rank.fail(self.failure)
        if on_failure is not None:
            on_failure(why)

    @contextmanager
    def ending_where_it_raises(self) -> Iterator[None]:
        """End the ranks where the block raises: with the failure of one, where one has failed."""
        try:
            yield
        except Exception as error:
            failure = self.failure
            self.close()
            if failure is not None and not isinstance(error, Fault):
                raise failure from error
            raise

    def lose_step(self, error: Exception) -> None:
        """Fail because a step raised here: for the reason of the rank that ended meanwhile, where one did."""
        if not self._failed.wait(ENDING_S):
            self.fail(f"a {type(error).__name__} in a step has left the ranks out of step")

    def leave_by(self, leave: Callable[[], None]) -> None:
        """Have `close` leave the group of ranks, which the first one has met."""
        self._held.callback(leave)

    def close(self) -> None:
        """End the processes."""
        self._closed.set()
        for rank in self._ranks:
            rank.hang_up()
        for rank in self._ranks:
            rank.end()
        self._held.close()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            for rank in self._ranks:
                began = rank.heard_s is None
                silent_s = time.monotonic() - (rank.heard_s or rank.began_s)
                if silent_s > (self._begin_s if began else self.hung_s):
                    did = "did not begin" if began else "did not answer"
                    self.fail(f"{rank.name} {did} for {silent_s:.0f} s")
                    return


class _Rank:
    """The process of a rank."""

    def __init__(self, rank: int, environment: Mapping[str, str], host: RankHost) -> None:
        self.name = f"rank {rank} of {host.world}"
        self.began_s = time.monotonic()
        self.heard_s: float | None = None
        self._host = host
        self._answers: dict[int, Future[Any]] = {}
        self._sending = threading.Lock()
        pairs = [socket.socketpair() for _ in range(2)]
        self.steps, self._control = (Connection(ours.detach()) for ours, _ in pairs)
        theirs = [*(each.fileno() for _, each in pairs), host.memory.descriptor]
        self.process = subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
            python(MODULE, *map(str, theirs)),
            stdin=subprocess.DEVNULL,
            pass_fds=theirs,
            env=environment,
        )
        for _, each in pairs:
            each.close()
        self._reader = threading.Thread(target=self._read, name=f"rank-{rank}", daemon=True)
        self._reader.start()
        self._rank = rank

    def ask(self, number: int, name: str, arguments: tuple[Any, ...]) -> Future[Any]:
        """Ask for something."""
        answer: Future[Any] = Future()
        self._answers[number] = answer
        facts = [{**each, "rank": self._rank} if isinstance(each, dict) else each for each in arguments]
        with self._sending:
            self.send(self._control, msgpack.packb([number, name, *facts]))
        if self._host.failure is not None:
            self.fail(self._host.failure)
        return answer

    def send(self, to: Connection, message: bytes) -> None:
        """Send a message; nothing happens when the rank is gone, for its reader notices."""
        with suppress(OSError):
            to.send_bytes(message)

    def fail(self, failure: ReplicaFailed) -> None:
        """Resolve what waits for the rank."""
        for number in list(self._answers):
            answer = self._answers.pop(number, None)
            if answer is not None:
                answer.set_exception(failure)

    def kill(self) -> None:
        """End the process, hanging or not."""
        if self.process.poll() is None:
            self.process.kill()

    def hang_up(self) -> None:
        """Let the process end: it does when the sockets are closed."""
        for each in (self.steps, self._control):
            with suppress(OSError):
                socket.socket(fileno=os.dup(each.fileno())).shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Wait for the end of the process."""
        try:
            self.process.wait(ENDED_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self._reader.join()
        self.steps.close()
        self._control.close()

    def _read(self) -> None:
        """Take answers until the process is gone."""
        with suppress(EOFError, OSError):
            while True:
                number, found, value = msgpack.unpackb(self._control.recv_bytes())
                self.heard_s = time.monotonic()
                answer = self._answers.pop(number, None)
                if answer is not None and found:
                    answer.set_result(value)
                elif answer is not None:
                    answer.set_exception(_named(fault_from(value), self.name))
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDED_S)
        status = self.process.poll()
        how = "closed its channel" if status is None else f"ended with {_status(status)}"
        self._host.fail(f"{self.name} {how}")


def _named(fault: Fault, rank: str) -> Fault:
    return fault if isinstance(fault, SettingsInvalid) else fault.with_message(f"{rank}: {fault.message}")


def _status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}; the log above says why"


def _environment(rank: int, cards: int) -> dict[str, str]:
    """Return the environment of a rank, which sees its own card alone."""
    found = {name: value for name, value in os.environ.items() if name != SOCKET}
    if cards:
        visible = found.get(DEVICES, "").split(",") if found.get(DEVICES) else [*map(str, range(cards))]
        found[DEVICES] = visible[rank]
    return found
