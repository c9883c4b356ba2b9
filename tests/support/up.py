"""``loramux up`` on the demo's deployment, as a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.e2e.real import EXAMPLES, deployment
from tests.support.s3_gateway import free_port

LORAMUX: Final = Path(sys.executable).parent / "loramux"
READY_S: Final = 240
END_S: Final = 60
"""For a service that drains, and for what stands in its way."""


@dataclass(frozen=True)
class Up:
    """The command as it runs, and where its doors are."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    builder: str


@contextmanager
def up(folder: Path) -> Iterator[Up]:
    """Run the command on free ports until it is ready; it is ended afterwards."""
    deployment()
    doors = {name: f"127.0.0.1:{free_port()}" for name in ("grpc", "http", "builder")}
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
        yield Up(process, **doors)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
