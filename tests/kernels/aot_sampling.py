"""The kernels in the tuning tables of the sampler."""

from collections.abc import Iterator

import torch

from inference_service.engine.kernels.sampling import triton_kernels, tuning
from inference_service.engine.kernels.sampling.launch import SHIFTS
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
        race = {"BLOCK": tuning.RACE.block}
        yield _variant("race", dtype, race, {"num_warps": tuning.RACE.num_warps}, "stride_tiles")
        config = tuning.PICK[torch_dtype.itemsize]
        pick = {"TILES": tiles, "SHIFT": SHIFTS[torch_dtype], "LINES": config.lines, "BLOCK": config.block}
        yield _variant("pick", dtype, pick, {"num_warps": config.num_warps}, "tiles", "stride_tiles")
        shape = {"num_warps": tuning.SHAPE.num_warps, "enable_fp_fusion": False}
        yield _variant("shape", dtype, {"BLOCK": tuning.SHAPE.block}, shape, "V", "words", "stride_logits")
    edit = {"ENTRIES": tuning.EDIT.entries, "BLOCK": tuning.EDIT.block}
    yield _variant("edit", "fp32", edit, {"num_warps": tuning.EDIT.num_warps}, "V")
    yield _variant("note", "fp32", {"TILES": tiles}, {"num_warps": 1}, "V", "tiles")


def _variant(
    name: str, dtype: str, constants: dict[str, int], options: dict[str, int], *unaligned: str
) -> Variant:
    kernel = getattr(triton_kernels, f"{name}_kernel")
    return Variant(f"sampling.{name}", kernel, dtype, constants, options, TYPES, unaligned)
