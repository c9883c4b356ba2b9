"""What the tuning tables of SGMV ship."""

from collections.abc import Iterator

from inference_service.kernels.sgmv import triton_kernels, tuning
from tests.kernels.aot import Variant

TYPES = {
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
DTYPES = {2: "bf16", 4: "fp32"}


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of both tables."""
    shrinks = tuning.SHRINK[architecture]
    for (phase, itemsize), buckets in shrinks.items():
        for bucket, c in buckets.items():
            tiles = {"BLOCK_T": c.block_t, "BLOCK_R": c.block_r, "BLOCK_K": c.block_k}
            yield Variant(
                name=f"sgmv.shrink {phase.value} {bucket}",
                kernel=triton_kernels.shrink_kernel,
                dtype=DTYPES[itemsize],
                constants={"N_SLICES": 3, "UPCAST": False, **tiles},
                options={"num_warps": c.num_warps, "num_stages": c.num_stages},
                types=TYPES,
                unaligned=UNALIGNED,
            )
    for (phase, itemsize), expands in tuning.EXPAND[architecture].items():
        planes = max(c.split_k for c in shrinks[phase, itemsize].values())
        for bucket, e in expands.items():
            tiles = {"BLOCK_T": e.block_t, "BLOCK_R": e.block_r, "BLOCK_N": e.block_n, "PLANES": planes}
            yield Variant(
                name=f"sgmv.expand {phase.value} {bucket}",
                kernel=triton_kernels.expand_kernel,
                dtype=DTYPES[itemsize],
                constants={"UPCAST": False, **GROUP, **tiles},
                options={"num_warps": e.num_warps, "num_stages": e.num_stages},
                types=TYPES,
                unaligned=UNALIGNED,
            )
