"""``loramux up`` on the demo's deployment, as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.e2e.real import EXAMPLES, deployment

LORAMUX: Final = Path(sys.executable).parent / "loramux"
READY_S: Final = 240
END_S: Final = 60
"""For a service that drains, and for what stands in its way."""


@contextmanager
def up(folder: Path, **doors: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command until it is ready, with doors by their flags' names; it is ended afterwards."""
    deployment()
    command = [str(LORAMUX), "up", str(EXAMPLES / "deployment.yaml"), "--store", f"file://{folder}/store"]
    log = folder / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(word for name, address in doors.items() for word in (f"--{name}", address))],
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    try:
        deadline = time.monotonic() + READY_S
        while not re.search(r"^ready", log.read_text(), re.M):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
