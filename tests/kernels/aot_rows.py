"""The kernels in the tuning tables of rows."""

from collections.abc import Iterator
from typing import Any

from inference_service.engine.kernels.launch import RowTile
from inference_service.engine.kernels.rows import triton_kernels, tuning
from inference_service.engine.kernels.rows.launch import UNROUNDED
from inference_service.engine.kernels.sgmv import Phase, tuning as sgmv
from tests.kernels import aot_rounded, aot_sgmv
from tests.kernels.aot import Variant, typed, with_halves

DTYPES = {2: "bf16", 4: "fp32"}
UPDATED: dict[str, dict[str, Any]] = {
    "gelu_tanh": {"OFFSETS": (0, 14336), "SIZES": (14336, 14336), "ALIGNMENT": 16, "N_SLICES": 2},
    "gelu": {"OFFSETS": (0,), "SIZES": (14336,), "ALIGNMENT": 16, "N_SLICES": 1},
}
"""Slices by the activation: of gate and up, or of up alone."""
OWN_TYPES = {"*i32": "p_num_runs", "*i64": "p_tokens", "fp32": "eps offset scale cap"}
TYPES = aot_sgmv.TYPES | aot_rounded.FP8 | typed(OWN_TYPES)
# Every tile in the form that holds most; the others, which leave something out, in the middle one.
POST, OTHER_TILE = "post", 4096
NORMS: dict[str, dict[str, Any]] = {
    POST: {"p_bias": None, "CENTRED": False},
    "add": {"p_delta_weight": None, "p_bias": None, "CENTRED": False},
    "plain": {"p_delta_weight": None, "p_delta": None, "p_bias": None, "CENTRED": False},
    "layer": {"p_delta_weight": None, "CENTRED": True},
}


def variants(architecture: int) -> Iterator[Variant]:
    yield from with_halves(architecture, _entries(architecture))
    if architecture >= aot_rounded.FP8_FROM:
        yield from _fp8()


def _entries(architecture: int) -> Iterator[Variant]:
    for itemsize, dtype in DTYPES.items():
        for bucket, config in tuning.NORM.items():
            for form, absent in NORMS.items():
                if form == POST or bucket == OTHER_TILE:
                    name = f"rows.norm {form} {bucket}"
                    yield _variant(name, triton_kernels.norm_kernel, dtype, config, absent | UNROUNDED)
        tile = tuning.TILE[itemsize]
        for activated, halves in (("silu", 2), ("gelu_tanh", 2), ("gelu", 1)):
            constants = {"ACTIVATION": activated, "HALVES": halves, **UNROUNDED}
            yield _variant(
                f"rows.activated {activated}", triton_kernels.activated_kernel, dtype, tile, constants
            )
        every = sgmv.EXPAND[architecture]
        for phase, bucket, e in [(p, *each) for p in Phase for each in every[p, itemsize].items()]:
            tiles = {"BLOCK_T": e.block_t, "BLOCK_R": e.block_r, "STEP_N": e.step_n, "BLOCK_N": e.block_n}
            tiles |= {"PLANES": aot_sgmv.most_planes(itemsize, phase), "UPCAST": False}
            for updated, slices in UPDATED.items():
                yield Variant(
                    name=f"rows.activated_update {phase.value} {updated} {bucket}",
                    kernel=triton_kernels.activated_update_kernel,
                    dtype=dtype,
                    constants={**slices, **tiles, "ACTIVATION": updated},
                    options={"num_warps": e.num_warps, "num_stages": 1},
                    types=TYPES,
                    unaligned=aot_sgmv.UNALIGNED,
                )
        yield _variant("rows.embed", triton_kernels.embed_kernel, dtype, tile)
        yield _variant("rows.softcap", triton_kernels.softcap_kernel, dtype, tile)


def _fp8() -> Iterator[Variant]:
    activated = {"ACTIVATION": "gelu_tanh", "HALVES": 2}
    for name, table, constants in (("norm", tuning.NORM, NORMS[POST]), ("activated", tuning.FP8, activated)):
        kernel = getattr(triton_kernels, f"{name}_kernel")
        for bucket, config in table.items():
            yield _variant(f"rows.{name} fp8 {bucket}", kernel, "bf16", config, constants)


def _variant(
    name: str, kernel: Any, dtype: str, config: RowTile, constants: dict[str, Any] | None = None
) -> Variant:
    constants = {"BLOCK": config.block, **(constants or {})}
    return Variant(name, kernel, dtype, constants, {"num_warps": config.num_warps}, TYPES)
