"""Questions about untrusted data, answered by a process that bounds its time and its memory."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from builder_service.domain import sandboxed
from loramux_shared.faults import InternalFault, ResourcesExhausted

WAIT_S: Final = 60.0
"""For a process that takes seconds of a core, on a machine that has none to spare."""


class TooCostly(Exception):
    """A question that needs more than we give it; the text says more than what."""


@dataclass(frozen=True)
class Bounds:
    """The time and the memory that a question may take."""

    cpu_s: float
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.cpu_s:g} s and {self.memory_bytes >> 20} MB"


def ask(program: ModuleType, question: Mapping[str, Any], bounds: Bounds) -> Any:
    """Return what a program of this package answers; see `sandboxed`. Raise TooCostly for more time or memory,
    and ResourcesExhausted where this machine has no process for it.
    """
    limits = [f"{bounds.cpu_s:g}", str(bounds.memory_bytes)]
    command = [sys.executable, "-I", "-S", str(sandboxed.__file__), *limits, str(program.__file__)]
    try:
        ended = subprocess.run(  # noqa: S603 - this interpreter, and files of ours
            command, input=json.dumps(question).encode(), capture_output=True, timeout=WAIT_S, check=False
        )
    except OSError as error:
        raise ResourcesExhausted(f"no process can be started to check an adapter: {error.strerror}") from error
    except subprocess.TimeoutExpired as late:
        raise TooCostly(f"more than {WAIT_S:g} s") from late
    if ended.returncode < 0:
        raise TooCostly(f"more than {bounds.cpu_s:g} s")
    if ended.returncode:
        raise InternalFault(f"{program.__name__} failed with {ended.returncode}. Please report it.")
    answer = json.loads(ended.stdout)  # noqa: TID251 - a process of ours answers
    if "answer" not in answer:
        raise TooCostly(f"more than {bounds.memory_bytes >> 20} MB")
    return answer["answer"]
