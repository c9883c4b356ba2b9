"""npy files as another TensorRT-LLM converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.support.adapters import HIDDEN, INTERMEDIATE

Q, KV = HIDDEN, HIDDEN // 2
SIZES = {
    0: (HIDDEN, Q + 2 * KV),
    1: (HIDDEN, Q),
    2: (HIDDEN, KV),
    3: (HIDDEN, KV),
    4: (Q, HIDDEN),
    5: (HIDDEN, INTERMEDIATE),
    6: (INTERMEDIATE, HIDDEN),
    7: (HIDDEN, INTERMEDIATE),
    18: (HIDDEN, 2 * INTERMEDIATE),
}
Rows = list[tuple[int, int, int]]
"""(module id, layer, rank)"""
BF16 = np.dtype(ml_dtypes.bfloat16)


def matrices(module: int, layer: int, rank: int) -> tuple[Any, Any]:
    """A and B of a row, exact in every storage type."""
    random = np.random.default_rng([module, layer, rank])
    features, out = SIZES[module]
    a = random.integers(-64, 64, (rank, features)) / 32
    return a.astype(np.float32), (random.integers(1, 64, (out, rank)) / 32).astype(np.float32)


def write(
    folder: Path,
    rows: Rows,
    *,
    dtype: Any = np.float16,
    columns: int = 4,
    batch: bool = True,
    config_name: str = "model.lora_config.npy",
    extra: int = 3,
    change: Callable[[Any, Any], None] | None = None,
) -> Path:
    """Write the files of a converter: rows in their order, padded a little more than they must be."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = [np.concatenate([part.ravel() for part in matrices(*row)]) for row in rows]
    width = max(map(len, flat)) + extra
    weights = np.stack([np.pad(row, (0, width - len(row))) for row in flat])
    config = np.array([[*row, 0][:columns] for row in rows], np.int32)
    if change is not None:
        change(weights, config)
    stored = weights.astype(dtype)
    np.save(folder / "model.lora_weights.npy", stored[None] if batch else stored)
    np.save(folder / config_name, config[None] if batch else config)
    return folder
