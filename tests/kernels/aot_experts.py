"""The kernels in the tuning table of mixtures of experts."""

from collections.abc import Iterator
from typing import Any

from inference_service.engine.kernels.experts import triton_kernels, tuning
from inference_service.engine.kernels.packing import power_of_two
from inference_service.engine.kernels.rows.tuning import TILE as ROW_TILE
from inference_service.engine.kernels.sgmv import PREFILL_TILE
from tests.kernels.aot import Variant, typed, with_halves

DTYPES = {2: "bf16", 4: "fp32"}
TYPES = typed(
    {
        "*i32": "p_ids p_tokens p_experts p_places p_tiles p_rows p_slots p_counts p_token_ids p_seg_start "
        "p_seg_slot p_pass_start p_pass p_num_runs",
        "*fp32": "p_weights p_entry_scales p_scales p_place_scales",
        "fp32": "alpha limit",
    }
)
UNALIGNED = {
    *("E", "P", "k", "tiles", "slot_stride", "expert_stride", "nobody"),
    *("p_tiles", "p_rows", "p_seg_start", "p_seg_slot", "p_pass", "p_num_runs"),
}
COUNTS = {"usual": (128, 8), "most": (tuning.MAX_EXPERTS, 16)}
"""Experts, and those of a token."""


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry; they are the same for all architectures."""
    yield from with_halves(architecture, _entries())
    yield from _sorts()


def _entries() -> Iterator[Variant]:
    for (load, itemsize), config in tuning.GROUPED.items():
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        blocks = {"BLOCK_M": tuning.TILE[load], "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        for form, absent in {"rows bias": {}, "plain": {"p_rows": None, "p_bias": None}}.items():
            name, constants = f"experts.grouped {load.value} {form}", {**blocks, **absent, "UPCAST": False}
            yield _variant(name, triton_kernels.grouped_kernel, DTYPES[itemsize], constants, options)
    for itemsize, dtype in DTYPES.items():
        tile = ROW_TILE[itemsize]
        constants, options = {"BLOCK": tile.block}, {"num_warps": tile.num_warps}
        yield _variant("experts.clamped", triton_kernels.clamped_kernel, dtype, constants, options)
        yield _variant("experts.combine", triton_kernels.combine_kernel, dtype, constants, options)
        for name, (experts, top_k) in COUNTS.items():
            sizes = {"BLOCK_E": power_of_two(experts), "BLOCK_K": power_of_two(top_k), "RENORMALISED": True}
            options = {"num_warps": tuning.ROUTE_WARPS}
            yield _variant(f"experts.route {name}", triton_kernels.route_kernel, dtype, sizes, options)


def _sorts() -> Iterator[Variant]:
    """Numbers alone, of no model's type."""
    options = {"num_warps": tuning.SORT_WARPS}
    for load, (name, (experts, _)) in zip(tuning.Load, COUNTS.items(), strict=True):
        sizes = {"TILE": tuning.TILE[load], "BLOCK_E": power_of_two(experts), "BLOCK_P": tuning.SORT_BLOCK}
        name = f"experts.sort {load.value} {name}"
        yield _variant(name, triton_kernels.sort_kernel, "bf16", sizes, options)
    sizes = {"TILE": PREFILL_TILE, "BLOCK_P": tuning.SORT_BLOCK, "SPAN": tuning.SPAN}
    yield _variant("experts.starts", triton_kernels.starts_kernel, "bf16", sizes, options)
    plain = sizes | dict.fromkeys(("p_scales", "p_place_scales", "p_counts"))
    for name, constants in {"": plain, " scaled": sizes}.items():
        yield _variant(f"experts.segments{name}", triton_kernels.segments_kernel, "bf16", constants, options)
    sizes, options = {"BLOCK": tuning.SLOT_BLOCK}, {"num_warps": 1}
    absent = {"": ("p_entry_scales", "p_scales"), " scaled": ("p_num_runs",)}
    for name, constants in {name: sizes | dict.fromkeys(each) for name, each in absent.items()}.items():
        yield _variant(f"experts.slots{name}", triton_kernels.slots_kernel, "bf16", constants, options)


def _variant(name: str, kernel: Any, dtype: str, constants: dict[str, Any], options: dict[str, int]) -> Variant:
    return Variant(name, kernel, dtype, constants, options, TYPES, UNALIGNED)
