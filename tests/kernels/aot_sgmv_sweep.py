"""SGMV's kernels for every number of planes and of slices: more than the table of resources holds."""

from collections.abc import Iterator
from dataclasses import replace

from tests.kernels import aot_sgmv
from tests.kernels.aot import Variant

GROUPS = (
    {"OFFSETS": (0,), "SIZES": (8192,), "N_SLICES": 1},
    {"OFFSETS": (0, 14336), "SIZES": (14336, 14336), "N_SLICES": 2},
    {"OFFSETS": (0, 4096, 5120), "SIZES": (4096, 1024, 1024), "N_SLICES": 3},
    aot_sgmv.GROUP,
)


def variants(architecture: int) -> Iterator[Variant]:
    """Yield the variants that the launcher can make of the shipped configurations."""
    for entry in aot_sgmv.entries(architecture):
        for dtype in ("bf16", "fp16") if entry.dtype == "bf16" else (entry.dtype,):
            yield from _specialised(replace(entry, dtype=dtype))


def _specialised(variant: Variant) -> Iterator[Variant]:
    for group in GROUPS:
        most = variant.constants.get("PLANES", 1)
        for planes in (2**i for i in range(most.bit_length())):
            special = {k: v for k, v in {**group, "PLANES": planes}.items() if k in variant.constants}
            name = f"{variant.name} slices {group['N_SLICES']} planes {planes}"
            yield replace(variant, name=name, constants={**variant.constants, **special})
