"""Record the resources of every compiled kernel: registers, stack and shared memory.

Rewrites the lines of all packages of kernels, or of those named on the command line; others stay. What
they were made of goes into `sources.txt`:

    python -m tests.golden.kernels.write [PACKAGE ...]
"""

import re
import sys
from collections.abc import Collection
from pathlib import Path

from inference_service.engine.kernels.launch import ARCHITECTURES
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
    found, name = [], ""
    for row in TABLE.read_text().splitlines()[1:]:
        if not row.startswith(" "):
            name = row
            continue
        dtype, *cells = row.split()
        known = zip(ARCHITECTURES, cells, strict=True)
        found += [_line(name, dtype, architecture, cell) for architecture, cell in known if cell != "-"]
    return sorted(found, key=Line.order)


def table(lines: Collection[Line]) -> str:
    """Return a row for each dtype of a kernel, with registers/shared+stack on each architecture."""
    rows: dict[str, dict[str, dict[int, str]]] = {}
    for line in lines:
        cell = f"{line.registers}/{line.shared}" + (f"+{line.stack}" if line.stack else "")
        cells = rows.setdefault(line.name, {}).setdefault(line.dtype, dict.fromkeys(ARCHITECTURES, "-"))
        cells[line.architecture] = cell
    text = "kernel " + "".join(f" {f'sm_{each}':>9}" for each in ARCHITECTURES) + "\n"
    for name, dtypes in rows.items():
        text += f"{name}\n"
        text += "".join(f"  {dtype:<5}{_row(cells)}\n" for dtype, cells in dtypes.items())
    return text


def _row(cells: dict[int, str]) -> str:
    return "".join(f" {cell:>9}" for cell in cells.values())


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
