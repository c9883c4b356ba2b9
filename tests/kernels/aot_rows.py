"""The kernels in the tuning tables of rows."""

from collections.abc import Iterator
from typing import Any

from inference_service.kernels.launch import ARCHITECTURES, RowTile
from inference_service.kernels.rows import triton_kernels, tuning
from inference_service.kernels.sgmv import Phase, tuning as sgmv
from tests.kernels import aot_sgmv
from tests.kernels.aot import Variant, typed, with_halves

DTYPES = {2: "bf16", 4: "fp32"}
GATE_UP = {"OFFSETS": (0, 14336), "SIZES": (14336, 14336), "ALIGNMENT": 16, "N_SLICES": 2}
TYPES = aot_sgmv.TYPES | typed({"*i32": "p_num_runs", "*i64": "p_tokens", "fp32": "eps offset scale cap"})
# Every tile in the form that holds most; the others, which leave something out, in the middle one.
POST, OTHER_TILE = "post", 4096
NORMS: dict[str, dict[str, Any]] = {
    POST: {},
    "add": {"p_delta_weight": None},
    "plain": {"p_delta_weight": None, "p_delta": None},
}


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of both tables; they are the same for all architectures."""
    yield from with_halves(architecture, _entries())


def _entries() -> Iterator[Variant]:
    for itemsize, dtype in DTYPES.items():
        for bucket, config in tuning.NORM.items():
            for form, absent in NORMS.items():
                if form == POST or bucket == OTHER_TILE:
                    name = f"rows.rms_norm {form} {bucket}"
                    yield _variant(name, triton_kernels.rms_norm_kernel, dtype, config, absent)
        tile = tuning.TILE[itemsize]
        for gelu in (False, True):
            name = f"rows.gated {'gelu_tanh' if gelu else 'silu'}"
            yield _variant(name, triton_kernels.gated_kernel, dtype, tile, {"GELU": gelu})
        for bucket, e in sgmv.EXPAND[ARCHITECTURES[0]][Phase.DECODE, itemsize].items():
            tiles = {"BLOCK_T": e.block_t, "BLOCK_R": e.block_r, "BLOCK_N": e.block_n, "FEW_N": e.few_n}
            constants = {**GATE_UP, **tiles, "PLANES": aot_sgmv.most_planes(itemsize), "UPCAST": False}
            yield Variant(
                name=f"rows.gated_update {bucket}",
                kernel=triton_kernels.gated_update_kernel,
                dtype=dtype,
                constants={**constants, "GELU": True},
                options={"num_warps": e.num_warps, "num_stages": 1},
                types=TYPES,
                unaligned=aot_sgmv.UNALIGNED,
            )
        yield _variant("rows.embed", triton_kernels.embed_kernel, dtype, tile)
        yield _variant("rows.softcap", triton_kernels.softcap_kernel, dtype, tile)


def _variant(
    name: str, kernel: Any, dtype: str, config: RowTile, constants: dict[str, Any] | None = None
) -> Variant:
    constants = {"BLOCK": config.block, **(constants or {})}
    return Variant(name, kernel, dtype, constants, {"num_warps": config.num_warps}, TYPES)
