"""Record the resources of every compiled kernel: registers, stack and shared memory.

Rewrites the lines of all packages of kernels, or of those named on the command line; others stay. What
they were made of goes into `sources.txt`:

    python -m tests.golden.kernels.write [PACKAGE ...]
"""

import sys
from collections.abc import Collection
from pathlib import Path

from inference_service.kernels.launch import ARCHITECTURES
from tests.golden.kernels import sources
from tests.kernels.aot import PACKAGES, Line

TABLE = Path(__file__).with_name("resources.txt")


def printed(
    packages: Collection[str], architectures: Collection[int] = ARCHITECTURES, *options: str
) -> list[Line]:
    """Compile packages, in a process in which kernels are not made for the interpreter."""
    chosen = [*options, *packages, *(f"sm_{architecture}" for architecture in architectures)]
    return [*map(Line.parse, sources.run("tests.kernels.aot", chosen))]


def recorded() -> list[Line]:
    return [Line.parse(line) for line in TABLE.read_text().splitlines()[1:]]


def package_of(line: Line) -> str:
    return line.name.partition(".")[0]


def main() -> None:
    """Rewrite the lines of some packages or of all; lines of packages that do not exist any more go."""
    required = sys.argv[1:] or PACKAGES
    old = recorded() if TABLE.exists() else []
    stay = [line for line in old if package_of(line) not in required and package_of(line) in PACKAGES]
    found = sorted([*stay, *printed(required)], key=Line.order)
    TABLE.write_text("\n".join([Line.HEADER, *map(str, found)]) + "\n")
    sources.write(required)


if __name__ == "__main__":
    main()
