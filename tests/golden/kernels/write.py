"""Record the resources of every compiled kernel: registers, stack and shared memory.

Rewrites the lines of all packages of kernels, or of those named on the command line; others stay. What
they were made of goes into `sources.txt`:

    python -m tests.golden.kernels.write [PACKAGE ...]
"""

import re
import sys
from collections.abc import Collection
from pathlib import Path

from inference_service.kernels.launch import ARCHITECTURES
from tests.golden.kernels import sources
from tests.kernels.aot import PACKAGES, Line

TABLE = Path(__file__).with_name("resources.txt")


def printed(packages: Collection[str]) -> list[Line]:
    """Compile packages, in a process in which kernels are not made for the interpreter."""
    return [*map(Line.parse, sources.run("tests.kernels.aot", packages))]


def _line(name: str, dtype: str, architecture: int, cell: str) -> Line:
    registers, shared, *stack = map(int, re.split("[/+]", cell))
    return Line(name, dtype, architecture, registers, sum(stack), shared)


def recorded() -> list[Line]:
    """Return the lines of the table, in their order."""
    rows = [row.split() for row in TABLE.read_text().splitlines()[1:]]
    found = [
        _line(" ".join(row[: -len(cells) - 1]), row[-len(cells) - 1], architecture, cell)
        for row in rows
        for cells in [row[-len(ARCHITECTURES) :]]
        for architecture, cell in zip(ARCHITECTURES, cells, strict=True)
        if cell != "-"
    ]
    return sorted(found, key=Line.order)


def table(lines: Collection[Line]) -> str:
    """Return a row for each kernel and dtype, with registers/shared+stack on each architecture."""
    head = "".join(f" {f'sm_{each}':>10}" for each in ARCHITECTURES)
    rows = {(line.name, line.dtype): dict.fromkeys(ARCHITECTURES, "-") for line in lines}
    for line in lines:
        cell = f"{line.registers}/{line.shared}" + (f"+{line.stack}" if line.stack else "")
        rows[line.name, line.dtype][line.architecture] = cell
    return f"{'kernel':<44} dtype{head}\n" + "".join(
        f"{name:<44} {dtype:<5}" + "".join(f" {cell:>10}" for cell in cells.values()) + "\n"
        for (name, dtype), cells in rows.items()
    )


def package_of(line: Line) -> str:
    return line.name.partition(".")[0]


def main() -> None:
    """Rewrite the lines of some packages or of all; lines of packages that do not exist any more go."""
    required = sys.argv[1:] or PACKAGES
    old = recorded() if TABLE.exists() else []
    stay = [line for line in old if package_of(line) not in required and package_of(line) in PACKAGES]
    found = sorted([*stay, *printed(required)], key=Line.order)
    TABLE.write_text(table(found))
    sources.write(required)


if __name__ == "__main__":
    main()
