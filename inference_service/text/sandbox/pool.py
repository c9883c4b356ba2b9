"""A few processes for many who ask."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from inference_service.text.sandbox.loop import CPU_S
from inference_service.text.sandbox.process import IDLE_S, SandboxProcess

Asked = tuple[Mapping[str, Any], "Future[dict[str, str]]"]


class SandboxPool:
    """Processes of one module, at most so many; may be used by any number of threads.

    Questions of one kind are answered one after the other, and kinds take turns: one kind that takes all the
    time that it may holds one process. The process that was used last is taken first, so that those that are
    not needed idle, and end.
    """

    def __init__(self, module: str, most: int, idle_s: float = IDLE_S, cpu_s: float = CPU_S) -> None:
        self._threads = ThreadPoolExecutor(most, thread_name_prefix=module)
        self._idle = [SandboxProcess(module, idle_s, cpu_s) for _ in range(most)]
        self._waiting: dict[str, deque[Asked]] = {}
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
        """Answer the first question of a kind, and let the next one of it stand behind those of others."""
        with self._lock:
            question, answer = self._waiting[kind].popleft()
        if answer.set_running_or_notify_cancel():
            process = self._idle.pop()
            try:
                answer.set_result(process.ask(question))
            except Exception as error:  # noqa: BLE001 - raised where somebody waits for it
                answer.set_exception(error)
            finally:
                self._idle.append(process)
        with self._lock:
            more = bool(self._waiting[kind])
            if not more:
                del self._waiting[kind]
        if more:
            self._threads.submit(self._next, kind)
