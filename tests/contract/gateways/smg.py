"""The Shepherd Model Gateway itself, from PyPI, as a process."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.processes.watching import kill_at_end
from tests.support.s3_gateway import free_port
from tests.support.waiting import bounded


@asynccontextmanager
async def running_smg(folder: Path, workers: Sequence[str], *flags: str) -> AsyncIterator[str]:
    """Run SMG in front of workers; yields its address once it listens. Its log lies in the folder."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("smg")), "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--worker-urls", *workers),
        *(
            "--load-monitor-interval", "1", "--health-check-interval-secs", "1",
            "--health-failure-threshold", "1",
        ),
        *("--health-check-timeout-secs", "60"),  # a worker that is slow on a busy machine is not dead
        *flags,
    ]  # fmt: skip
    with (folder / "smg.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=_quiet())
    with kill_at_end(process):
        await _listening(port, process)
        yield f"http://127.0.0.1:{port}"


def _quiet() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


async def _listening(port: int, process: subprocess.Popen[bytes]) -> None:
    async with bounded("a gateway that listens"):
        while True:
            assert process.poll() is None, "the gateway ended"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
