"""What the tuning tables of the sampler ship."""

from collections.abc import Iterator

import torch

from inference_service.kernels.sampling import triton_kernels, tuning
from inference_service.kernels.sampling.launch import SHIFTS
from tests.kernels.aot import Variant

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES = {"p_rows": "*i32", "p_scores": "*fp32", "p_ids": "*i32", "p_out": "*i64"}
LARGEST_VOCAB = 262144


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of both tables; they are the same for all architectures."""
    tiles = -(-LARGEST_VOCAB // tuning.RACE.block)
    for torch_dtype, dtype in DTYPES.items():
        yield Variant(
            name="sampling.race",
            kernel=triton_kernels.race_kernel,
            dtype=dtype,
            constants={"BLOCK": tuning.RACE.block},
            options={"num_warps": tuning.RACE.num_warps},
            types=TYPES,
            unaligned={"stride_tiles"},
        )
        config = tuning.PICK[torch_dtype.itemsize]
        yield Variant(
            name="sampling.pick",
            kernel=triton_kernels.pick_kernel,
            dtype=dtype,
            constants={
                "TILES": tiles,
                "SHIFT": SHIFTS[torch_dtype],
                "LINES": config.lines,
                "BLOCK": config.block,
            },
            options={"num_warps": config.num_warps},
            types=TYPES,
            unaligned={"tiles", "stride_tiles"},
        )
