"""The inner side: answers questions within limits, one after the other."""

import json
import resource
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

CPU_S: Final = 1.0
"""For one question."""
MEMORY_BYTES: Final = 512 * 1024 * 1024
MAX_ANSWER_BYTES: Final = 97 * 1024 * 1024
"""Longest answer: a prompt of as many characters as `templates` renders, each two escapes of six bytes."""
TOO_DEEP: Final = {"error": "it is too deeply nested, or too much in another way"}


def serve(answer: Callable[[dict[str, Any]], dict[str, str]]) -> None:
    """Answer lines of JSON on stdin with lines of JSON on stdout, until some seconds pass without one.

    argv has those, and the seconds of a core that a question may take: one that takes more ends the process by
    the timer's signal. One that takes more memory than it may meets `MemoryError`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends this process by closing stdin
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    idle_s, cpu_s = map(float, sys.argv[1:])
    while select.select([sys.stdin], [], [], idle_s)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            result = answer(json.loads(line))  # noqa: TID251 - the sandbox bounds its memory
        except MemoryError:
            result = {"error": f"it takes more than {MEMORY_BYTES // 2**20} MB"}
        except RecursionError:
            result = TOO_DEEP
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
