"""``loramux up`` as a separate process."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.processes.watching import await_line
from tests.support.s3_gateway import free_ports
from tests.support.waiting import BOUND_S

LORAMUX: Final = Path(sys.executable).parent / "loramux"


@dataclass(frozen=True)
class Up:
    """The command as it runs, and its addresses."""

    process: subprocess.Popen[bytes]
    grpc: str
    http: str
    builder: str


@contextmanager
def run_up(folder: Path, file: Path | None = None, *flags: str) -> Iterator[Up]:
    """Run the command on a deployment file, or the demo's, on free ports until it is ready; end it then."""
    if file is None:
        from tests.e2e.real import EXAMPLES, deployment  # imports transformers

        deployment()
        file = EXAMPLES / "deployment.yaml"
    names = ("grpc", "http", "builder")
    apis = {name: f"127.0.0.1:{port}" for name, port in zip(names, free_ports(3), strict=True)}
    command = [str(LORAMUX), "up", str(file), "--store", f"file://{folder}/store", *flags]
    log = folder / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(word for name, address in apis.items() for word in (f"--{name}", address))],
            stdout=output,
            stderr=output,
            cwd=folder,
        )
    try:
        await_line(process, log, "^ready")
        yield Up(process, **apis)
    finally:
        process.terminate()
        try:
            process.wait(BOUND_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
