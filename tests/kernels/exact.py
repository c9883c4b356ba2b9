"""Compile the kernels that promise the bits of torch, and print the instructions that would give others.

A card rounds once in a fused product and sum, and its quick divisions are off by two digits; the interpreter
has neither:

    python -m tests.kernels.exact
"""

import re
import sys
from collections.abc import Iterator

from tests.kernels.aot import Variant, compiled, variants

ARCHITECTURE = 90
QUICK = r"(?:div|rcp)\.(?:full|approx)\S*"
FUSED = r"fma\S*\.f32"


def lines() -> Iterator[str]:
    """Yield each variant that promises bits with its inexact instructions."""
    for variant in variants(ARCHITECTURE, ["attention", "sampling"]):
        if (pattern := _inexact(variant)) is not None:
            ptx = compiled(ARCHITECTURE, variant).asm["ptx"]
            yield f"{variant.name} {variant.dtype}: {' '.join(sorted({*re.findall(pattern, ptx)})) or 'exact'}"


def _inexact(variant: Variant) -> str | None:
    """Return the instructions that a variant may not have; None where it promises no bits.

    Keys and values are rounded to 8 bits by divisions; their rotation is the same fused where products of their
    type are exact, and what is normed has sums in another order.
    """
    if variant.name.startswith("sampling.shape"):
        return rf"\b(?:{QUICK}|{FUSED})"
    if re.fullmatch(r"attention\.rope_write \d+ norm none (int8|fp8)", variant.name):
        return rf"\b{QUICK}"
    return None


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
