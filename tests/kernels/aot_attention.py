"""What the tuning tables of attention ship, for heads that are served."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from inference_service.kernels.attention import triton_kernels, tuning
from inference_service.kernels.launch import ARCHITECTURES
from tests.kernels.aot import Variant, covering

TYPES = {
    "p_partial": "*fp32",
    "p_lse": "*fp32",
    "p_cache_rows": "*i32",
    "p_items": "*i32",
    "p_merges": "*i32",
    "p_blocks": "*i32",
    "stride_kv": "i64",
    "scale": "fp32",
    "softcap": "fp32",
    "eps": "fp32",
    "offset": "fp32",
}
UNALIGNED = {"window"}
ITEMSIZES: Final = {"bf16": 2, "fp16": 2, "fp32": 4}
KV = 8
DIMS: Final = (64, 80, 96, 128, 256)
LAYERS: Final[dict[str, tuple[Any, ...]]] = {
    "architecture": ARCHITECTURES,
    "dtype": tuple(ITEMSIZES),
    "dim": DIMS,
    "group": (1, 4, 6, 7, 8),
    "softcap": (True, False),
    "window": (False, True),
    "pieces": (True, False),
}
NORMS: Final = ("none", "one", "each", "each, offset")


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every tile, and every two of what a layer may be that changes what is compiled."""
    yield from (v for row in _layers() if row["architecture"] == architecture for v in attends(row))
    for dtype in ITEMSIZES:
        for index, dim in enumerate(DIMS):
            # Every norm with every type and every size on one of the architectures.
            yield _rope(architecture, dtype, dim, NORMS[(index + ARCHITECTURES.index(architecture)) % len(NORMS)])
            yield _merge(architecture, dtype, dim)


@cache
def _layers() -> list[dict[str, Any]]:
    return covering(LAYERS, lambda row: (row["architecture"], *_configs(row)))


def _configs(row: Mapping[str, Any]) -> list[tuning.TileConfig]:
    """The tiles of decode and prefill."""
    where = row["architecture"], row["dtype"], row["dim"]
    return [_bucket(tables, *where) for tables in (tuning.DECODE, tuning.PREFILL)]


def attends(row: Mapping[str, Any]) -> Iterator[Variant]:
    """Yield decode and prefill of one of `LAYERS`."""
    absent = [name for name in ("softcap", "window") if not row[name]]
    absent += () if row["pieces"] else ("p_partial", "p_lse")
    words = [name for name in ("softcap", "window", "pieces") if row[name]]
    for name, config in zip(("decode", "prefill"), _configs(row), strict=True):
        decodes = name == "decode"
        constants = {
            "TILE": 1 if decodes else config.block_m // row["group"],
            "MIN_SPAN": (tuning.DECODE_BALANCE if decodes else tuning.PREFILL_BALANCE).min_span,
            "GROUP": row["group"],
            "KV": KV,
            "BLOCK_SIZE": 16,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "UPCAST": False,
            **dict.fromkeys(absent),
        }
        where = f"{name} {row['dim']} x {row['group']}"
        kernel = triton_kernels.attend_kernel
        yield _variant(" ".join([where, *words]), kernel, row["dtype"], row["dim"], constants, config)


def _rope(architecture: int, dtype: str, dim: int, norm: str) -> Variant:
    config = _bucket(tuning.ROPE, architecture, dtype, dim)
    # A part of the larger heads is turned.
    constants = {"H": 4 * KV, "KV": KV, "ROTARY": dim // 2 if dim > 128 else dim, "BLOCK_H": config.block}
    constants |= {"ROUND_NORM": norm == "each"} | ({"p_norm": None} if norm == "none" else {})
    name = f"rope_write {dim} norm {norm}"
    return _variant(name, triton_kernels.rope_write_kernel, dtype, dim, constants, config)


def _merge(architecture: int, dtype: str, dim: int) -> Variant:
    config = _bucket(tuning.MERGE, architecture, dtype, dim)
    constants = {"H": 4 * KV, "BLOCK_S": config.block}
    return _variant(f"merge {dim}", triton_kernels.merge_kernel, dtype, dim, constants, config)


def _bucket(tables: tuning.Tables[tuning.Config], architecture: int, dtype: str, dim: int) -> tuning.Config:
    buckets = tables[architecture][ITEMSIZES[dtype]]
    return buckets[next(key for key in buckets if dim <= key)]


def _variant(
    name: str,
    kernel: Any,
    dtype: str,
    dim: int,
    constants: Mapping[str, Any],
    config: tuning.TileConfig | tuning.SmallConfig,
) -> Variant:
    return Variant(
        name=f"attention.{name}",
        kernel=kernel,
        dtype=dtype,
        constants={**constants, "D": dim, "BLOCK_D": 1 << (dim - 1).bit_length()},
        options={k: v for k, v in vars(config).items() if k.startswith("num_")},
        types=TYPES,
        unaligned=UNALIGNED,
    )
