"""The other contenders beside the servers, in a process of its own that answers loads in turn with them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

Load = dict[str, Any]
"""``models``, ``prompts``, ``concurrency`` and ``new`` tokens of each prompt."""


class Peer:
    """A script of this folder: for each line, a load, it writes tokens/s and seconds to the first token."""

    def __init__(self, script: str, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", f"benchmarks.{script}", *map(str, arguments)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)  # noqa: S603 - our own

    async def load(self, models: Sequence[str], prompts: Sequence[str], concurrency: int, new: int) -> Any:
        """Have one load done."""
        load = {"models": list(models), "prompts": list(prompts), "concurrency": concurrency, "new": new}
        return json.loads(await asyncio.to_thread(self._ask, json.dumps(load)))

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End it."""
        with self._process:
            assert self._process.stdin is not None  # noqa: S101 - it is a pipe
            self._process.stdin.close()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def answer(measure: Callable[[Load], tuple[float, float]]) -> None:
    """Measure the load of every line of stdin, until it ends."""
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)
