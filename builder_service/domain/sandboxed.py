"""``python -I -S limited.py CPU_S MEMORY_BYTES FILE``: answers one question within limits.

The question is JSON on stdin, FILE has the function ``answer``, and what it returns is JSON on stdout. Nothing
but the standard library here and there: the process starts in 25 ms, and needs no installation.
"""

import json
import resource
import runpy
import signal
import sys
from contextlib import suppress


def main(cpu_s: str, memory_bytes: str, file: str) -> None:
    """Answer; a signal ends what takes more time than it may."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    signal.setitimer(signal.ITIMER_PROF, float(cpu_s))
    try:
        result = {"answer": runpy.run_path(file)["answer"](json.load(sys.stdin))}  # noqa: TID251 - a process of ours asks
    except MemoryError:
        result = {}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
