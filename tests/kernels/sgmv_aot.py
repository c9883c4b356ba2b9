"""Compile every configuration of the SGMV tuning tables ahead of time and print what ptxas made of it.

A script rather than a test, because it needs the kernels as the compiler sees them and the tests import them
for the interpreter. Prints one JSON object per line.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inference_service.kernels.sgmv import triton_kernels, tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {
    "p_y": "*fp32",
    "p_scales": "*fp32",
    "p_token_ids": "*i32",
    "p_seg_start": "*i32",
    "p_seg_slot": "*i32",
    "p_table": "*i64",
}
# As the launcher specialises: what is not a multiple of 16 in general.
UNALIGNED = {"blocks_k", "p_table", "p_seg_start", "p_seg_slot"}
# A fused qkv: the widest table, and slices that differ.
GROUP = {"OFFSETS": (0, 4096, 5120), "SIZES": (4096, 1024, 1024), "ALIGNMENT": 16, "N_SLICES": 3}


def compilations(architecture: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, int], str, str]]:
    """(kernel, constants, options, dtype, name) of everything that the tables ship for one architecture."""
    shrinks = tuning.SHRINK[architecture]
    for (phase, itemsize), buckets in shrinks.items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        for bucket, c in buckets.items():
            tiles = {"BLOCK_T": c.block_t, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k}
            options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
            name = f"shrink {phase.value} {bucket}"
            yield triton_kernels.shrink_kernel, {"N_SLICES": 3, **tiles}, options, dtype, name
    for (phase, itemsize), expands in tuning.EXPAND[architecture].items():
        dtype = {2: "bf16", 4: "fp32"}[itemsize]
        planes = max(c.split_k for c in shrinks[phase, itemsize].values())
        for bucket, e in expands.items():
            tiles = {"BLOCK_T": e.block_t, "BLOCK_R": e.block_r, "BLOCK_N": e.block_n, "PLANES": planes}
            options = {"num_warps": e.num_warps, "num_stages": e.num_stages}
            yield (
                triton_kernels.expand_kernel,
                {**GROUP, **tiles},
                options,
                dtype,
                f"expand {phase.value} {bucket}",
            )


def compiled(
    architecture: int, kernel: Any, constants: dict[str, Any], options: dict[str, int], dtype: str
) -> Any:
    """Compile one kernel as the launcher would specialise it."""
    constants = {**constants, "UPCAST": False}
    signature = {
        name: "constexpr"
        if name in constants
        else POINTERS.get(name, f"*{dtype}" if name.startswith("p_") else "i32")
        for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in UNALIGNED
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and SHARED of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def main() -> None:
    """Report on the architectures named on the command line."""
    for architecture in map(int, sys.argv[1:]):
        for kernel, constants, options, dtype, name in compilations(architecture):
            result = compiled(architecture, kernel, constants, options, dtype)
            used = usage(result.asm["cubin"])
            line = {
                "architecture": architecture,
                "name": name,
                "dtype": dtype,
                "shared": result.metadata.shared,
            }
            sys.stdout.write(json.dumps(line | used) + "\n")


if __name__ == "__main__":
    main()
