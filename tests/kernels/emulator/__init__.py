"""Operations of another architecture under qemu, for tests of results, not of speed.

The tests run in a process whose heap is a file (``shared_heap.c``). The operations run in an emulated process
that maps it at the same address (``server.cpp``), so a call needs only its arguments.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from inference_service.engine.kernels.cpu import compiling
from inference_service.engine.kernels.cpu.compiling import KINDS
from tests.support.root import ROOT
from tests.support.waiting import BOUND_S

HERE: Final = Path(__file__).parent
COMPILER: Final = "aarch64-linux-gnu-g++"
EMULATOR: Final = "qemu-aarch64"
SERVER, HEAP = "EMULATED_SERVER", "SHARED_HEAP"
"""Variables: the emulated program, and the file of the heap, below which the tests' process was started."""


def missing() -> str | None:
    """Return the names of missing tools; None where nothing is missing."""
    found = [name for name in (COMPILER, EMULATOR, "gcc") if shutil.which(name) is None]
    return f"{', '.join(found)} not found (Debian: g++-aarch64-linux-gnu, qemu-user)" if found else None


def run_tests(folder: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a process with compiled operations of 64-bit ARM; folder gets the build."""
    heap, server, preload = folder / "heap", folder / "server", folder / "heap.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", HERE / "shared_heap.c", "-o", preload], check=True)
    [kind] = KINDS["aarch64"]
    flags = [flag for flag in compiling.flags_of(kind) if flag not in ("-shared", "-fPIC")]
    source = [f"-I{compiling.SOURCE.parent}", f"-I{HERE}", str(HERE / "server.cpp")]
    subprocess.run([COMPILER, *flags, "-static", *source, "-o", server], check=True, capture_output=True)
    heap.touch()
    os.truncate(heap, 1 << 34)
    environment = {
        **os.environ, SERVER: str(server), HEAP: str(heap), "LD_PRELOAD": str(preload),
        "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.kernels.emulator.plugin", *tests]
    try:
        return subprocess.run(
            command,
            env=environment,
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=10 * BOUND_S,
        )
    finally:
        heap.unlink()  # a gigabyte
