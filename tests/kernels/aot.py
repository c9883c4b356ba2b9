"""Compile every shipped configuration of every kernel ahead of time, and print what ptxas made of it.

A script rather than a test, because it needs the kernels as the compiler sees them and the tests import them
for the interpreter. Prints one JSON object per line:

    python -m tests.kernels.aot 90 [PACKAGE ...]
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("sgmv",)
"""Each with a module ``tests.kernels.aot_<package>``, whose ``variants(architecture)`` yields `Variant`."""


@dataclass(frozen=True)
class Variant:
    """A kernel as its launcher would specialise it for one configuration of its tuning table."""

    name: str
    """Unique within an architecture; begins with the package's name."""
    kernel: Any
    dtype: str
    """Triton's name of the activations' type: what pointers have that are not in ``types``."""
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    """num_warps and num_stages."""
    types: Mapping[str, str] = field(default_factory=dict)
    """Of the other arguments: ``*fp32``, ``*i32``, ``fp32``, ...; what is not a pointer is i32 by default."""
    unaligned: Collection[str] = ()
    """Arguments that are not known to be multiples of 16."""


def variants(architecture: int, packages: Collection[str] = PACKAGES) -> Iterator[Variant]:
    """Yield everything that the tables ship for one architecture."""
    for package in packages:
        yield from importlib.import_module(f"tests.kernels.aot_{package}").variants(architecture)


def compiled(architecture: int, variant: Variant) -> Any:
    """Compile one variant."""
    import triton
    from triton.backends.compiler import GPUTarget
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
    source = ASTSource(
        fn=variant.kernel, signature=signature, constexprs=dict(variant.constants), attrs=attributes
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(variant.options))


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


def main() -> None:
    """Report on an architecture, and on all packages or those named on the command line."""
    architecture, packages = int(sys.argv[1]), sys.argv[2:]
    for variant in variants(architecture, packages or PACKAGES):
        result = compiled(architecture, variant)
        line = {
            "architecture": architecture,
            "name": variant.name,
            "dtype": variant.dtype,
            "shared": result.metadata.shared,
        }
        sys.stdout.write(json.dumps(line | usage(result.asm["cubin"])) + "\n")


if __name__ == "__main__":
    main()
