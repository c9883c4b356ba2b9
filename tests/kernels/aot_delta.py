"""The kernels in the tuning tables of the gated delta rule, for heads that are served."""

from collections.abc import Iterator, Mapping
from typing import Any

from inference_service.engine.kernels.delta import triton_kernels, tuning
from tests.kernels.aot import Variant, typed, with_halves

TYPES = typed(
    {
        "*fp32": "p_decay p_dt_bias p_total p_values p_reads p_weights",
        "*i32": "p_chunks p_tiles",
        "fp32": "eps scale",
    }
)
STATES = {"p_states": "*fp32"}
DTYPES = {"bf16": 2, "fp32": 4}
DIM = 128
"""Size of keys and of values: the largest that is served, and that of all of Qwen 3.5."""
WIDTH = 4


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of the tables; they are the same for all architectures."""
    yield from with_halves(architecture, _entries())


def _entries() -> Iterator[Variant]:
    for dtype, itemsize in DTYPES.items():
        conv, tiles = tuning.CONV, tuning.TILES[itemsize]
        for name, block_t in (("decode", 1), ("mixed", conv.block_t)):
            sizes = {"WIDTH": WIDTH, "BLOCK_T": block_t, "BLOCK_W": WIDTH, "BLOCK_C": conv.block_c}
            yield _variant(f"conv {name}", triton_kernels.conv_kernel, dtype, sizes, conv.num_warps, TYPES)
        heads = {"H": 32, "GROUP": 2, "K": DIM, "V": DIM, "BLOCK_K": DIM, "BLOCK_V": DIM}
        tiled = {"BLOCK_T": tiles.tile, "PRECISION": tiles.precision}
        solve = {"LEVELS": tiles.tile.bit_length() - 1, "SOLVE_PRECISION": tiles.solve_precision}
        solve |= {"UPCAST": False, "BLOCK_D": tiles.block_d}
        for name, kernel, constants, warps in (
            ("step alone", triton_kernels.step_kernel, {"ALONE": True}, tuning.STEP_WARPS),
            ("step mixed", triton_kernels.step_kernel, {"ALONE": False}, tuning.STEP_WARPS),
            ("prepare", triton_kernels.prepare_kernel, tiled | solve, tiles.prepare_warps),
            ("scan", triton_kernels.scan_kernel, tiled | {"BLOCK_V": tiles.block_v}, tiles.scan_warps),
            ("gate", triton_kernels.gate_kernel, {"BLOCK_T": tuning.GATE_BLOCK_T}, tuning.GATE_WARPS),
        ):
            taken = {k: v for k, v in (heads | constants).items() if k in kernel.arg_names}
            yield _variant(name, kernel, dtype, taken, warps, TYPES | STATES)


def _variant(
    name: str, kernel: Any, dtype: str, constants: Mapping[str, Any], num_warps: int, types: Mapping[str, str]
) -> Variant:
    options = {"num_warps": num_warps, "num_stages": tuning.NUM_STAGES}
    return Variant(f"delta.{name}", kernel, dtype, constants, options, types, {"stride_b", "stride_a"})
