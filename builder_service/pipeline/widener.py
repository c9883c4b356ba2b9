"""Weights of few bits, widened for a builder by a process of its own: the builder never imports torch."""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from builder_service.domain.safetensors_header import TensorFile, read_header
from loramux_shared.faults import FAULTS, InternalFault, ResourcesExhausted
from loramux_shared.process import python

NEEDS: Final = ("torch", "inference_service")
MODULE: Final = "inference_service.engine.models.lowbit.widen"
LIMIT_S: Final = 600.0
"""For one weight, the start of the process included; a large one takes a second."""
POLL_S: Final = 0.5


def open_widener(work: Path, check: Callable[[], None]) -> Widener | None:
    """Return what widens weights into a work folder, or None where its packages are not installed."""
    there = all(importlib.util.find_spec(name) is not None for name in NEEDS)
    return Widener(work, check) if there else None


class Widener:
    """Widens weights of a base one by one, for several threads, in a process that lives as long as this."""

    def __init__(self, work: Path, check: Callable[[], None]) -> None:
        """Write into a work folder; check raises what the build was asked to end with."""
        self._work = work
        self._check = check
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def widen(self, base: Path, name: str, shape: tuple[int, int]) -> TensorFile:
        """Return a file with a weight in float32, which goes with the object.

        Raises:
            CheckpointInvalid: there is none of this name and shape, or its tensors do not go together.
            ResourcesExhausted: it takes too long, or the process was killed.
            InternalFault: the process failed.
        """
        path = self._work / "widened.safetensors"
        request = {"base": str(base), "name": name, "shape": shape, "into": str(path)}
        with self._lock:
            self._work.mkdir(parents=True, exist_ok=True)
            answer = self._ask(json.dumps(request).encode() + b"\n")
            if fault := answer.get("fault"):
                raise FAULTS.get(fault["reason"], InternalFault)(f"base: {fault['message']}")
            file = read_header(path)
            file.detach()
        return file

    def _ask(self, line: bytes) -> dict[str, Any]:
        process = self._process = self._process or self._started()
        if process.stdin is None or process.stdout is None:
            raise InternalFault("widening a base: the process has no pipes. Please report it.")
        begin = time.monotonic()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            while not select.select([process.stdout], [], [], POLL_S)[0]:
                self._check()
                if time.monotonic() - begin > LIMIT_S:
                    raise ResourcesExhausted(f"widening a weight takes more than {LIMIT_S:g} s here")
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply:
            answer: dict[str, Any] = json.loads(reply)  # noqa: TID251 - a process of ours answers
            return answer
        self._process = None
        if (status := process.wait()) < 0:
            raise ResourcesExhausted(f"widening a base: the process was killed by signal {-status}")
        raise InternalFault(f"widening a base: the process ended with {status}: {self._last_words()}")

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        last = self._errors.read()[-512:].decode(errors="replace").strip().rpartition("\n")[2]
        return f"{last}. Please report it."

    def _started(self) -> subprocess.Popen[bytes]:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
            python(MODULE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, which also ends by itself when its stdin is closed."""
    process.kill()
    process.communicate()
