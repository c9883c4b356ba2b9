"""The builder as a process, on the forge's store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.moving.forge import Forge
from benchmarks.serving import BASE, ROOT, end_process
from loramux.cli.local.tree import free_address

LOOPBACK = "127.0.0.1:0"


class Builder:
    """The builder service; it may read what the forge wrote."""

    def __init__(self, forge: Forge) -> None:
        self.grpc = free_address(LOOPBACK)
        command = [sys.executable, "-m", "builder_service", "--store", f"file://{forge.work}/store"]
        command += ["--grpc", self.grpc, "--local-root", str(forge.work), "--local-root", str(BASE)]
        self.log = forge.work / f"builder-{self.grpc.rpartition(':')[2]}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log, cwd=ROOT, env=os.environ)  # noqa: S603 - ours
        self.run("health", self.grpc, "--wait", "60")

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes that it has read and written so far, of files and sockets together."""
        lines = Path(f"/proc/{self._process.pid}/io").read_text().splitlines()
        reported = dict(line.split(": ") for line in lines)
        return int(reported["rchar"]), int(reported["wchar"])

    def run(self, *arguments: str) -> float:
        """Run the command line; return the seconds that it took."""
        command = [str(Path(sys.executable).parent / "loramux"), *arguments]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own command
        if done.returncode:
            raise RuntimeError(
                f"{command} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}"
            )
        return time.perf_counter() - began

    def stop(self) -> None:
        """End it as an operator does."""
        end_process(self._process)


@contextmanager
def builder(forge: Forge) -> Iterator[Builder]:
    """Run a builder for as long as the block takes."""
    running = Builder(forge)
    try:
        yield running
    finally:
        running.stop()
