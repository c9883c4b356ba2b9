"""The outer side: processes that answer questions and are started again after they ended, and pools of them."""

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from inference_service.text.sandbox.loop import CPU_S, MAX_ANSWER_BYTES, TOO_DEEP
from loramux_shared.process import python
from loramux_shared.untrusted_json import JsonInvalid, parse_strict_json

IDLE_S: Final = 60.0
STILL_S: Final = 60.0
"""For an answer that takes a second of a core, on a machine that has none to spare."""
PIECE: Final = 1 << 16
TURN_S: Final = 0.01
"""Questions of one kind are answered for so long while others wait; a thread for each costs more than most."""


class SandboxProcess:
    """A process that answers questions of one thread at a time; it is started when there is one."""

    def __init__(self, module: str, idle_s: float = IDLE_S, cpu_s: float = CPU_S) -> None:
        """Take a module of this package that calls `loop.serve`; the process ends after idle_s without one."""
        self._cpu_s = cpu_s
        self.still_s = STILL_S
        """A process that has not answered for so long is ended."""
        self.command = python(f"{__package__}.{module}", f"{idle_s}", f"{cpu_s}")
        """Starts the process."""
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process; another question would start it again."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def ask(self, question: Mapping[str, Any]) -> dict[str, str]:
        """Return the answer; ``{"error": why}`` where the question cannot be put, or ended the process."""
        try:
            line = json.dumps(question).encode() + b"\n"
        except RecursionError:
            return TOO_DEEP
        # None where the process had ended before the question: the idle limit ended it
        answer = self._exchange(line)
        return self._exchange(line) or _LOST if answer is None else answer

    def _exchange(self, line: bytes) -> dict[str, str] | None:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        process = self._process
        try:
            answer = self._answer(process, line)
        except BrokenPipeError:
            return None
        except TimeoutError:
            process.kill()
            process.wait()
            return {"error": f"its sandbox did not answer for {self.still_s:g} s. Send the request again."}
        if answer.endswith(b"\n") or len(answer) > MAX_ANSWER_BYTES:  # else it ended before, or within it
            if (found := read_answer(answer)) is None:
                process.kill()
                process.wait()
            return _GARBLED if found is None else found
        status = process.wait()
        if status == -signal.SIGPROF:
            return {"error": f"it takes more than {self._cpu_s:g} s"}
        if status > 0:  # Python ended itself: the process lacks a module, or a right
            return _LOST
        return None if status == 0 else TOO_DEEP

    def _answer(self, process: subprocess.Popen[bytes], line: bytes) -> bytearray:
        """Write a line and read one, or what the process wrote before its end or beyond the bound.

        Raises:
            BrokenPipeError: it had ended before.
            TimeoutError: it stands still, or gets no core.
        """
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        ours, theirs = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(ours, False)
        until_s, left, answer = time.monotonic() + self.still_s, memoryview(line), bytearray()
        while not answer.endswith(b"\n") and len(answer) <= MAX_ANSWER_BYTES:
            ready = select.poll()
            ready.register(*((ours, select.POLLOUT) if left else (theirs, select.POLLIN)))
            if not ready.poll(max(0.0, until_s - time.monotonic()) * 1000):
                raise TimeoutError
            if left:
                left = left[os.write(ours, left) :]
            elif piece := os.read(theirs, PIECE):
                answer += piece
            else:
                break
        return answer


def read_answer(line: bytes | bytearray) -> dict[str, str] | None:
    """Return the answer that a line is; None for bytes that are none: a sandbox may have been taken over."""
    try:
        found = parse_strict_json(bytes(line)) if len(line) <= MAX_ANSWER_BYTES else None
    except JsonInvalid:
        return None
    texts = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    return found if texts else None


_LOST: Final = {"error": "the template's sandbox does not start; the server's log has the reason"}
_GARBLED: Final = {"error": "its sandbox wrote something else than an answer, and was ended"}

Query = tuple[Mapping[str, Any], "Future[dict[str, str]]"]


class SandboxPool:
    """Processes of one module, at most so many; may be used by any number of threads.

    Questions of one kind are answered one after the other, and kinds take turns: one kind that takes all the
    time that it may holds one process. The process that was used last is taken first, so that those that are
    not needed idle, and end.
    """

    def __init__(self, module: str, most: int, idle_s: float = IDLE_S, cpu_s: float = CPU_S) -> None:
        self._threads = ThreadPoolExecutor(most, thread_name_prefix=module)
        self._idle = [SandboxProcess(module, idle_s, cpu_s) for _ in range(most)]
        self._waiting: dict[str, deque[Query]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """End threads and processes, when what was asked is answered."""
        self._threads.shutdown()
        for process in self._idle:
            process.close()

    def ask(self, kind: str, question: Mapping[str, Any]) -> Future[dict[str, str]]:
        """Return what becomes the answer, as `SandboxProcess.ask` gives it."""
        answer: Future[dict[str, str]] = Future()
        with self._lock:
            first = kind not in self._waiting
            self._waiting.setdefault(kind, deque()).append((question, answer))
        if first:
            self._threads.submit(self._next, kind)
        return answer

    def _next(self, kind: str) -> None:
        """Answer the first questions of a kind, and put the next one of it after those of others."""
        process, until_s, more = self._idle.pop(), time.monotonic() + TURN_S, True
        while more and time.monotonic() < until_s:
            with self._lock:
                question, answer = self._waiting[kind].popleft()
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(process.ask(question))
                except Exception as error:  # noqa: BLE001 - raised to the caller
                    answer.set_exception(error)
            with self._lock:
                more = bool(self._waiting[kind])
                if not more:
                    del self._waiting[kind]
        self._idle.append(process)
        if more:
            self._threads.submit(self._next, kind)
