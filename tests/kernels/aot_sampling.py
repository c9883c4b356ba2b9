"""The kernels in the tuning tables of the sampler."""

from collections.abc import Iterator

import torch

from inference_service.kernels.sampling import triton_kernels, tuning
from inference_service.kernels.sampling.launch import SHIFTS
from tests.kernels.aot import Variant, typed

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES = typed(
    {
        "*i32": "p_rows p_ids p_packed p_counts p_masks p_last p_drawn p_impossible",
        "*fp32": "p_scores p_shaped",
        "*i64": "p_out",
    }
)
LARGEST_VOCAB = 262144


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of the tables; they are the same for all architectures."""
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
        yield Variant(
            name="sampling.shape",
            kernel=triton_kernels.shape_kernel,
            dtype=dtype,
            constants={"BLOCK": tuning.SHAPE.block},
            options={"num_warps": tuning.SHAPE.num_warps, "enable_fp_fusion": False},
            types=TYPES,
            unaligned={"V", "words", "stride_logits"},
        )
    yield Variant(
        name="sampling.edit",
        kernel=triton_kernels.edit_kernel,
        dtype="fp32",
        constants={"ENTRIES": tuning.EDIT.entries, "BLOCK": tuning.EDIT.block},
        options={"num_warps": tuning.EDIT.num_warps},
        types=TYPES,
        unaligned={"V"},
    )
    yield Variant(
        name="sampling.note",
        kernel=triton_kernels.note_kernel,
        dtype="fp32",
        constants={"TILES": tiles},
        options={"num_warps": 1},
        types=TYPES,
        unaligned={"V", "tiles"},
    )
