"""Compile every shipped configuration of every kernel ahead of time, and print the resources of ptxas.

A script rather than a test, because it needs the kernels as the compiler sees them and the tests import them
for the interpreter. Prints one line per kernel, type and architecture, in the order of the golden table:

    python -m tests.kernels.aot [--one] [PACKAGE ...] [sm_ARCHITECTURE ...]

With `--one`, one of each kernel.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

from inference_service.engine.kernels.launch import ARCHITECTURES

PACKAGES = ("attention", "delta", "experts", "rounded", "rows", "sampling", "sgmv")
"""Each with a module ``tests.kernels.aot_<package>``, whose ``variants(architecture)`` yields `Variant`."""


@dataclass(frozen=True)
class Variant:
    """A kernel as its launcher would specialise it for one configuration of its tuning table."""

    name: str
    """Unique within an architecture and dtype; begins with the package's name and a dot."""
    kernel: Any
    dtype: str
    """Triton's name of the activations' type: what pointers have that are not in ``types``."""
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    """num_warps and num_stages."""
    types: Mapping[str, str] = field(default_factory=dict)
    """Types of the other arguments, as ``*fp32`` or ``fp32``; what is no pointer is i32 by default."""
    unaligned: Collection[str] = ()
    """Arguments that are not known to be multiples of 16."""


def typed(names: Mapping[str, str]) -> dict[str, str]:
    """Return the type of each argument, of names by their type."""
    return {name: kind for kind, each in names.items() for name in each.split()}


@dataclass(frozen=True)
class Line:
    """The resources of one kernel, as a line of the golden table."""

    name: str
    dtype: str
    architecture: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread: not 0 means that registers are spilled."""
    shared: int
    """Bytes per program."""

    def __str__(self) -> str:
        where = f"{self.name:<44} {self.dtype:<5} sm_{self.architecture:<3}"
        return f"{where} {self.registers:>9} {self.stack:>5} {self.shared:>6}"

    @classmethod
    def parse(cls, text: str) -> "Line":
        *name, dtype, architecture, registers, stack, shared = text.split()
        numbers = map(int, (architecture.removeprefix("sm_"), registers, stack, shared))
        return cls(" ".join(name), dtype, *numbers)

    def order(self) -> tuple[list[str], str, int]:
        """Return the sorting key: by name, numbers by their value; then by dtype and architecture."""
        parts = re.split(r"(\d+)", self.name)
        return [part.zfill(8) if part.isdigit() else part for part in parts], self.dtype, self.architecture


def variants(architecture: int, packages: Collection[str] = PACKAGES) -> Iterator[Variant]:
    """Yield everything that the tables ship for one architecture."""
    for package in packages:
        yield from importlib.import_module(f"tests.kernels.aot_{package}").variants(architecture)


def with_halves(architecture: int, found: Iterator[Variant]) -> Iterator[Variant]:
    """Yield variants, and those of bf16 in fp16 too: each on one of the architectures, in turn."""
    turn = ARCHITECTURES.index(architecture)
    for index, variant in enumerate(found):
        yield variant
        if variant.dtype == "bf16" and index % len(ARCHITECTURES) == turn:
            yield replace(variant, dtype="fp16")


def covering(
    choices: Mapping[str, Sequence[Any]], entry: Callable[[Mapping[str, Any]], Hashable]
) -> list[dict[str, Any]]:
    """Return a few of all combinations, with every two values of two choices and every ``entry`` among them."""
    rows = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    goals = [frozenset({entry(row), *combinations(row.items(), 2)}) for row in rows]
    missing, chosen = frozenset[Any]().union(*goals), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(goals[i] & missing))
        missing -= goals[best]
        chosen.append(rows[best])
    return chosen


def source_of(variant: Variant) -> Any:
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {
        name: "constexpr"
        if name in variant.constants
        else variant.types.get(name, f"*{variant.dtype}" if name.startswith("p_") else "i32")
        for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] != "constexpr" and name not in variant.unaligned and "fp" not in signature[name][:2]
    }
    return ASTSource(
        fn=variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=attributes
    )


def compiled(architecture: int, variant: Variant) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source_of(variant), target=target, options=dict(variant.options))


def usage(cubin: bytes) -> dict[str, int]:
    """REG and STACK of the one kernel in a cubin."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def one_of_each(found: Iterable[Variant]) -> list[Variant]:
    """Return the first variant of each kernel."""
    first: dict[Any, Variant] = {}
    for variant in found:
        first.setdefault(variant.kernel, variant)
    return [*first.values()]


def lines(packages: Collection[str], architectures: Collection[int], *, one: bool = False) -> Iterator[str]:
    """Compile and yield the lines of packages, or one of each kernel; equal variants are compiled once."""
    made: dict[tuple[int, str], Line] = {}
    found = []
    for architecture in architectures:
        ships = variants(architecture, packages)
        for variant in one_of_each(ships) if one else ships:
            key = architecture, repr(replace(variant, name=""))
            if key not in made:
                result = compiled(architecture, variant)
                used = usage(result.asm["cubin"])
                made[key] = Line("", "", 0, used["REG"], used["STACK"], result.metadata.shared)
            found.append(replace(made[key], name=variant.name, dtype=variant.dtype, architecture=architecture))
    return map(str, sorted(found, key=Line.order))


def main() -> None:
    """Print the lines of all packages and architectures, or of those named on the command line."""
    architectures = [int(word[3:]) for word in sys.argv[1:] if word.startswith("sm_")]
    packages = [word for word in sys.argv[1:] if not word.startswith(("sm_", "--"))]
    for line in lines(packages or PACKAGES, architectures or ARCHITECTURES, one="--one" in sys.argv):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
