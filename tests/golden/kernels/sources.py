"""Print the sources of the table of resources, so that unchanged kernels need no compilation.

What the compiler makes of a kernel follows from its source and that of what it calls, from the values that are
constants of it, from the target and from the compiler's version. The line of a kernel has the digest of all
these for each architecture. Triton's own cache asks for the same. Prints them:

    python -m tests.golden.kernels.sources
"""

import hashlib
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from inference_service.engine.kernels.launch import ARCHITECTURES
from tests.kernels.aot import PACKAGES, Variant, source_of, variants
from tests.support.root import ROOT

RECORDED = Path(__file__).with_name("sources.txt")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
    "TRITON_DEFAULT_FP_FUSION": "1"
}
"""Environment of processes in which kernels are compiled, and not interpreted."""


def lines() -> Iterator[str]:
    """Yield the compiler's version, and a line for each kernel with a digest for each architecture."""
    import triton

    yield f"triton {triton.__version__}"
    for package in PACKAGES:
        digests = [dict(_of(package, architecture)) for architecture in ARCHITECTURES]
        for name in sorted({name for each in digests for name in each}):
            yield f"{name:<34} {' '.join(each.get(name, '-') for each in digests)}"


def _of(package: str, architecture: int) -> Iterator[tuple[str, str]]:
    ships: defaultdict[str, list[Variant]] = defaultdict(list)
    for variant in variants(architecture, [package]):
        _ignore_its_place(variant.kernel)
        ships[f"{package}.{variant.kernel.__name__}"].append(variant)
    for name, found in sorted(ships.items()):
        made_of = sorted(f"{v.name} {v.dtype} {source_of(v).hash()} {sorted(v.options.items())}" for v in found)
        yield name, hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]


def _ignore_its_place(kernel: Any) -> None:
    """Triton hashes the lines above a kernel and its callees: hash none, as they change nothing else."""
    from triton.runtime.jit import JITCallable

    for function in [*kernel.__globals__.values()]:
        if isinstance(function, JITCallable) and function.starting_line_number:
            function.starting_line_number = 0
            _ignore_its_place(function)


def run(module: str, arguments: Collection[str] = ()) -> list[str]:
    """Return the lines that a module prints where kernels are as the compiler sees them."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()


def found() -> list[str]:
    """Return the lines for the present compiler and sources."""
    return run("tests.golden.kernels.sources")


def write(packages: Collection[str]) -> None:
    """Keep those of packages; those of others stay where they are still true."""
    old = set(RECORDED.read_text().splitlines())
    version, *lines = found()
    keep = [line for line in lines if line.partition(".")[0] in packages or line in old]
    RECORDED.write_text("\n".join([version, *keep]) + "\n")


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
