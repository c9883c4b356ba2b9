"""What the tuning tables of attention ship."""

from collections.abc import Iterator, Mapping
from typing import Any

from inference_service.kernels.attention import triton_kernels, tuning
from tests.kernels.aot import Variant

TYPES = {
    "p_partial": "*fp32",
    "p_lse": "*fp32",
    "p_cache_rows": "*i32",
    "p_chunks": "*i32",
    "p_tiles": "*i32",
    "p_blocks": "*i32",
    "stride_kv": "i64",
    "scale": "fp32",
    "softcap": "fp32",
    "eps": "fp32",
    "offset": "fp32",
}
UNALIGNED = {"window"}
DTYPES = {2: "bf16", 4: "fp32"}
# Heads of as many dimensions as the bucket holds, 4 to a group, with everything that a layer may have.
HEADS = {"GROUP": 4, "KV": 8}
SHARED = {**HEADS, "BLOCK_SIZE": 16, "UPCAST": False}


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every entry of all tables, decode with and without splits, prefill with and without a window."""
    for itemsize, dtype in DTYPES.items():
        for name, kernel, bucket, constants, config in _kernels(architecture, itemsize):
            yield Variant(
                name=f"attention.{name} {bucket}",
                kernel=kernel,
                dtype=dtype,
                constants={**constants, "D": bucket, "BLOCK_D": bucket},
                options={k: v for k, v in vars(config).items() if k.startswith("num_")},
                types=TYPES,
                unaligned=UNALIGNED,
            )


def _kernels(
    architecture: int, itemsize: int
) -> Iterator[tuple[str, Any, int, Mapping[str, Any], tuning.TileConfig | tuning.SmallConfig]]:
    """(name, kernel, bucket, constants but for the dimensions, config)."""
    whole = {"SPLITS": 1, "p_partial": None, "p_lse": None}
    for bucket, c in tuning.DECODE[architecture][itemsize].items():
        tiles = {**SHARED, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "MIN_SPAN": tuning.MIN_SPAN}
        yield "decode whole", triton_kernels.decode_kernel, bucket, {**tiles, **whole}, c
        yield "decode split", triton_kernels.decode_kernel, bucket, {**tiles, "SPLITS": tuning.MAX_SPLITS}, c
    for bucket, c in tuning.PREFILL[architecture][itemsize].items():
        rows = c.block_m // HEADS["GROUP"]
        tiles = {**SHARED, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "TILE": rows}
        yield "prefill", triton_kernels.prefill_kernel, bucket, {**tiles, "window": None}, c
        yield "prefill window", triton_kernels.prefill_kernel, bucket, tiles, c
    for bucket, s in tuning.ROPE[architecture][itemsize].items():
        heads = {"H": 32, "KV": 8, "ROTARY": bucket, "ROUND_NORM": True, "BLOCK_H": s.block}
        yield "rope_write", triton_kernels.rope_write_kernel, bucket, heads, s
    for bucket, s in tuning.MERGE[architecture][itemsize].items():
        splits = {"H": 32, "SPLITS": tuning.MAX_SPLITS, "MIN_SPAN": tuning.MIN_SPAN, "BLOCK_S": s.block}
        yield "merge", triton_kernels.merge_kernel, bucket, splits, s
