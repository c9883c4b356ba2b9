"""Keep what the compiler makes of every kernel: registers, stack and shared memory.

Rewrites the lines of all packages of kernels, or of those named on the command line; others stay:

    python -m tests.golden.kernels.write [PACKAGE ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from inference_service.kernels.launch import ARCHITECTURES
from tests.kernels.aot import PACKAGES, Line

TABLE = Path(__file__).with_name("resources.txt")


def printed(packages: Collection[str], architectures: Collection[int] = ARCHITECTURES) -> list[Line]:
    """Compile packages, in a process in which kernels are not made for the interpreter."""
    chosen = [*packages, *(f"sm_{architecture}" for architecture in architectures)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    text = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", *chosen],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return [Line.parse(line) for line in text.splitlines()]


def kept() -> list[Line]:
    """Read the table."""
    return [Line.parse(line) for line in TABLE.read_text().splitlines()[1:]]


def package_of(line: Line) -> str:
    """The package that a line is about."""
    return line.name.partition(".")[0]


def main() -> None:
    """Rewrite the lines of some packages or of all; lines of packages that do not exist any more go."""
    wanted = sys.argv[1:] or PACKAGES
    old = kept() if TABLE.exists() else []
    stay = [line for line in old if package_of(line) not in wanted and package_of(line) in PACKAGES]
    found = sorted([*stay, *printed(wanted)], key=Line.order)
    TABLE.write_text("\n".join([Line.HEADER, *map(str, found)]) + "\n")


if __name__ == "__main__":
    main()
