"""The kernels in the tuning tables of attention, for heads that are served."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Final

from inference_service.engine.kernels.attention import triton_kernels, tuning
from inference_service.engine.kernels.launch import ARCHITECTURES, RowTile
from inference_service.engine.kernels.sgmv import Phase, tuning as sgmv
from tests.kernels import aot_sgmv
from tests.kernels.aot import Variant, covering, typed

TYPES = aot_sgmv.TYPES | typed(
    {
        "*i32": "p_num_runs p_cache_rows p_items p_merges p_blocks",
        "*fp32": "p_partial p_lse p_sinks",
        "*bf16": "p_scales",
        "i64": "stride_kv",
        "fp32": "scale softcap eps offset",
    }
)
UNALIGNED = {"window", *aot_sgmv.UNALIGNED}
EIGHT_BITS: Final = {"int8": "*i8", "fp8": "*fp8e4nv"}
FP8_FROM: Final = 90
"""The first architecture of these that knows it."""
ITEMSIZES: Final = {"bf16": 2, "fp16": 2, "fp32": 4}
KV = 8
CACHES: Final = {"own": {}, **{name: {"p_keys": kind, "p_values": kind} for name, kind in EIGHT_BITS.items()}}
"""Types of keys and values."""
WHERE: Final[dict[str, tuple[Any, ...]]] = {
    "architecture": ARCHITECTURES,
    "dtype": tuple(ITEMSIZES),
    "dim": (64, 80, 96, 128, 256, 512),
}
LAYERS: Final[dict[str, tuple[Any, ...]]] = {
    **WHERE,
    "group": (1, 4, 6, 7, 8),
    "softcap": (True, False),
    "window": (False, True),
    "pieces": (True, False),
    "sinks": (False, True),
    "cache": tuple(CACHES),
}
NORMS: Final[dict[str, tuple[Any, ...]]] = {
    **WHERE,
    "norm": ("none", "one", "of heads"),
    "cache": tuple(CACHES),
}
UPDATES: Final[dict[str, tuple[Any, ...]]] = {
    **WHERE,
    "cache": ("own",),
    "dim": tuple(dim for dim in WHERE["dim"] if dim <= tuning.MAX_UPDATED_DIM),
    "norm": ("none", "of heads"),
    "bucket": (16, 32),
}


def variants(architecture: int) -> Iterator[Variant]:
    """Yield every tile, and every pair of options of a layer that changes the compiled code."""
    for row in _chosen():
        if row["architecture"] == architecture:
            if "group" in row:
                yield from attends(row)
            elif "bucket" in row:
                yield _rope_update(row)
            else:
                yield _rope(row) if "norm" in row else _merge(row)


@cache
def _chosen() -> list[dict[str, Any]]:
    """Return those of all layers, norms, and places alone that cover them and every tile."""
    return [
        *_possible(covering(LAYERS, lambda row: (row["architecture"], row["cache"], *_configs(row)))),
        *_possible(covering(NORMS, lambda row: (row["architecture"], _bucket(tuning.ROPE, row)))),
        *covering(WHERE, lambda row: (row["architecture"], _bucket(tuning.MERGE, row))),
        *covering(UPDATES, lambda row: (row["architecture"], _bucket(tuning.ROPE_UPDATE, row))),
    ]


def _possible(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each existing option once: an architecture without fp8 has int8 in its place."""
    seen = set()
    for row in rows:
        if row["cache"] == "fp8" and row["architecture"] < FP8_FROM:
            row = {**row, "cache": "int8"}
        if tuple(row.items()) not in seen:
            seen.add(tuple(row.items()))
            yield row


def _configs(row: Mapping[str, Any]) -> list[tuning.TileConfig]:
    eight = row["cache"] != "own"
    return [_bucket(tuning.tiles(decodes=decodes, eight_bits=eight), row) for decodes in (True, False)]


def attends(row: Mapping[str, Any]) -> Iterator[Variant]:
    absent = [name for name in ("softcap", "window") if not row[name]]
    absent += () if row["pieces"] else ("p_partial", "p_lse")
    absent += () if row["sinks"] else ("p_sinks",)
    absent += ("p_scales",) if row["cache"] == "own" else ()
    words = [name for name in ("softcap", "window", "pieces", "sinks") if row[name]] + _words(row)
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
        yield _variant(" ".join([where, *words]), triton_kernels.attend_kernel, row, constants, config)


def _rope(row: Mapping[str, Any]) -> Variant:
    config, dim, norm = _bucket(tuning.ROPE, row), row["dim"], row["norm"]
    # A part of the larger heads is turned.
    constants = {"H": 4 * KV, "KV": KV, "ROTARY": dim // 2 if dim > 128 else dim, "BLOCK_H": config.block}
    constants |= {"NORMED": 0 if norm == "none" else 5 * KV}
    constants |= {"ROUND_NORM": norm == "of heads"} | ({"p_norm": None} if norm == "none" else {})
    constants |= {"p_scales": None} if row["cache"] == "own" else {}
    name = " ".join([f"rope_write {dim} norm {norm}", *_words(row)])
    return _variant(name, triton_kernels.rope_write_kernel, row, constants, config)


def _words(row: Mapping[str, Any]) -> list[str]:
    return [] if row["cache"] == "own" else [row["cache"]]


def _rope_update(row: Mapping[str, Any]) -> Variant:
    dim, itemsize, plain = row["dim"], ITEMSIZES[row["dtype"]], _rope(row)
    buckets, config = sgmv.EXPAND[row["architecture"]][Phase.DECODE, itemsize], _bucket(tuning.ROPE_UPDATE, row)
    expand = buckets[min(row["bucket"], max(buckets))]
    sizes = 4 * KV * dim, KV * dim, KV * dim
    left = {name: value for name, value in plain.constants.items() if name not in ("BLOCK_H", "p_scales")}
    constants = left | {
        "OFFSETS": (0, sizes[0], sizes[0] + sizes[1]),
        "SIZES": sizes,
        "ALIGNMENT": 16,
        "N_SLICES": 3,
        "PLANES": aot_sgmv.most_planes(itemsize),
        "BLOCK_T": config.block,
        "BLOCK_R": expand.block_r,
        "UPCAST": False,
    }
    name = f"rope_update {dim} norm {row['norm']} rank {row['bucket']}"
    variant = _variant(name, triton_kernels.rope_write_update_kernel, row, constants, config)
    return replace(variant, options={**variant.options, "num_stages": 1})


def _merge(row: Mapping[str, Any]) -> Variant:
    config = _bucket(tuning.MERGE, row)
    constants = {"H": 4 * KV, "BLOCK_S": config.block}
    return _variant(f"merge {row['dim']}", triton_kernels.merge_kernel, row, constants, config)


def _bucket(tables: tuning.Tables[tuning.Config], row: Mapping[str, Any]) -> tuning.Config:
    buckets = tables[row["architecture"]][ITEMSIZES[row["dtype"]]]
    return buckets[next(key for key in buckets if row["dim"] <= key)]


def _variant(
    name: str,
    kernel: Any,
    row: Mapping[str, Any],
    constants: Mapping[str, Any],
    config: tuning.TileConfig | RowTile,
) -> Variant:
    constants = {**constants, "D": row["dim"], "BLOCK_D": 1 << (row["dim"] - 1).bit_length()}
    options = {k: v for k, v in vars(config).items() if k.startswith("num_")}
    types = TYPES | CACHES[row.get("cache", "own")]
    return Variant(f"attention.{name}", kernel, row["dtype"], constants, options, types, UNALIGNED)
