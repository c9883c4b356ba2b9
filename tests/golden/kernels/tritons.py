"""Compile the kernels ahead of time with each Triton that a torch brings: minutes of a core for each, no GPU.

    python -m tests.golden.kernels.tritons [VERSION ...] [--one] [PACKAGE ...] [sm_ARCHITECTURE ...]

Each version is installed into a temporary folder, which is first on the path of the process that compiles.
Prints how many variants were compiled and which spill registers; the exit status is 1 where one was not.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inference_service.startup.choose import TRITONS
from tests.golden.kernels.sources import ENVIRONMENT
from tests.kernels.aot import Line
from tests.support.root import ROOT

LISTED = 8
"""Names of variants that spill, at most."""


def compiled(version: str, options: Sequence[str], folder: Path) -> list[Line]:
    """Install a version, and compile with it.

    Raises:
        subprocess.CalledProcessError: a kernel does not compile, or another Triton than this was found.
    """
    install = ["pip", "install", "-q", "--no-deps", "--target", str(folder), f"triton=={version}.*"]
    subprocess.run([sys.executable, "-m", *install], check=True)
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    look = f"import triton; assert triton.__version__.startswith({version!r}), triton.__version__"
    subprocess.run([sys.executable, "-c", look], check=True, env=environment, cwd=ROOT)
    command = [sys.executable, "-m", "tests.kernels.aot", *options]
    found = subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return [*map(Line.parse, found.stdout.splitlines())]


def main(arguments: Sequence[str]) -> int:
    """Print a line for each version; 1 where a kernel does not compile."""
    versions = [word for word in arguments if re.fullmatch(r"\d+\.\d+", word)]
    options = [word for word in arguments if word not in versions]
    status = 0
    for version in versions or TRITONS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines = compiled(version, options, Path(folder))
            except subprocess.CalledProcessError as failed:
                sys.stdout.write(f"Triton {version}: failed: {' '.join(failed.cmd)}\n")
                status = 1
                continue
        spills = [
            f"{line.name} {line.dtype} sm_{line.architecture}: {line.stack}" for line in lines if line.stack
        ]
        sys.stdout.write(f"Triton {version}: {len(lines)} variants compiled, {len(spills)} spill\n")
        sys.stdout.write("".join(f"  {each} bytes\n" for each in spills[:LISTED]))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
