"""llama.cpp's script and library, in a process of their own."""

import json
import subprocess
from pathlib import Path
from typing import Final, Self

import numpy as np

from tests.golden.servers.reference import PROMPT, LogProbs
from tests.golden.servers.vllm_server import Refused

_WORKER: Final = Path(__file__).with_name("llama_worker.py")


class LlamaCpp:
    """A worker for one base; it is started again where an adapter ended it."""

    def __init__(self, python: Path, scripts: Path, base: Path) -> None:
        self._argv = [str(python), str(_WORKER), str(scripts), str(base), *map(str, PROMPT)]
        self._log = base.parent / f"{base.name}.log"
        self._process = self._started()

    @staticmethod
    def version(python: Path) -> str:
        """Return the tag of the environment's llama.cpp."""
        code = "from llama_cpp_py_sync import __llama_cpp_tag__ as tag; print(tag)"
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.wait()

    def log_probs(self) -> LogProbs:
        """Return what the base says."""
        return self.try_adapter(None)

    def try_adapter(self, folder: Path | None) -> LogProbs:
        """Return what the base says with an adapter; raise Refused with the script's or the library's words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = self._log.stat().st_size
        self._process.stdin.write(f"{folder or ''}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        log = self._log.read_bytes()[started:].decode(errors="replace")
        if not line:
            self.close()
            self._process = self._started()
            raise Refused(f"the process ended: {_complaint(log)}")
        reply = json.loads(line)
        if "refused" in reply:
            raise Refused(f"{reply['refused']}: {_complaint(log)}".rstrip(": "))
        return np.array(reply["log_probs"])

    def _started(self) -> "subprocess.Popen[str]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )


def _complaint(log: str) -> str:
    """Return the lines of a log that say what is wrong."""
    marks = ("ERROR", "error", "GGML_ASSERT", "failed")
    lines = [line.strip() for line in log.splitlines() if any(mark in line for mark in marks)]
    return "; ".join(dict.fromkeys(lines))
