"""The kernels in the tuning tables of products with weights of few bits."""

from collections.abc import Iterator
from typing import Any, Final

from inference_service.engine.kernels.rounded import launch, triton_kernels
from tests.kernels.aot import Variant, with_halves

DTYPES: Final = {2: "bf16", 4: "fp32"}
TYPES: Final = {"p_values": "*i8", "p_scales": "*bf16", "p_zeros": "*i8"}
FP8: Final = {"p_values": "*fp8e4nv", "p_scales": "*fp32"}
WIDTH: Final = 4096
WEIGHTS: Final[dict[str, dict[str, Any]]] = {
    "int8": {"BITS": 8, "GROUP": WIDTH, "p_zeros": None},
    "int4": {"BITS": 4, "GROUP": 32, "p_zeros": None},
    "int4 zeros": {"BITS": 4, "GROUP": 128},
}
FP8_FROM: Final = 90


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every tile for every kind of weight; they are the same for all architectures."""
    yield from with_halves(architecture, _entries(architecture))


def _entries(architecture: int) -> Iterator[Variant]:
    for itemsize, dtype in DTYPES.items():
        for name, weight in WEIGHTS.items():
            for rows, tile in launch.tiles_of(weight["BITS"], itemsize, old=triton_kernels.OLD).items():
                constants = {"BLOCK_M": rows, "BLOCK_N": tile.block_n, "BLOCK_B": tile.block_b, "UPCAST": False}
                options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
                yield _variant(
                    f"product {name} {rows}", "product_kernel", dtype, weight | constants, options, TYPES
                )
            constants = {"BLOCK_B": launch.WIDEN_BLOCK}
            yield _variant(f"widen {name}", "widen_kernel", dtype, weight | constants, {"num_warps": 4}, TYPES)
    if architecture >= FP8_FROM:
        for dtype in ("bf16", "fp16", "fp32"):
            yield _variant("round_rows", "round_rows_kernel", dtype, {"BLOCK": WIDTH}, {"num_warps": 8}, FP8)


def _variant(
    name: str,
    kernel: str,
    dtype: str,
    constants: dict[str, Any],
    options: dict[str, int],
    types: dict[str, str],
) -> Variant:
    constants = {"K": WIDTH, **constants}
    return Variant(f"rounded.{name}", getattr(triton_kernels, kernel), dtype, constants, options, types)
