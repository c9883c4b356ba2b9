"""The outer side: asks, and starts the process again after it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from inference_service.serving.bounded.loop import CPU_S


class BoundedProcess:
    """A process that answers questions, started when there is one; may be used by any number of threads."""

    def __init__(self, module: str) -> None:
        """Take the name of a module of this package that calls `loop.serve`."""
        self._command = [sys.executable, "-m", f"{__package__}.{module}"]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=module)
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: Mapping[str, Any]) -> Future[dict[str, str]]:
        """Return what becomes the answer; ``{"error": why}`` where the question ended the process.

        Who asks the same process waits for those who asked before, and for nobody else.
        """
        return self._thread.submit(self._ask, question)

    def _ask(self, question: Mapping[str, Any]) -> dict[str, str]:
        line = json.dumps(question).encode() + b"\n"
        # None where it had ended before it read: it was idle for long
        answer = self._exchange(line)
        return self._exchange(line) or _LOST if answer is None else answer

    def _exchange(self, line: bytes) -> dict[str, str] | None:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own module
        process = self._process
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            return None
        if answer:
            return dict(json.loads(answer))
        status = process.wait()
        if status == -signal.SIGPROF:
            return {"error": f"it takes more than {CPU_S:g} s"}
        return None if status == 0 else {"error": "it is too deeply nested, or too much in another way"}


_LOST = {"error": "the process that looks at it does not start; the server's log has the reason"}
