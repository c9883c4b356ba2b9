"""How much memory a base and its adapters take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loramux_shared.bases.read import read_fields
from loramux_shared.bundle.modules import MODULES
from loramux_shared.faults import CheckpointInvalid

RANKS: Final = (8, 16, 32, 64)
ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_SHARE: Final = 0.25
"""Of what the weights leave, for the cache, when nobody says how much."""


@dataclass(frozen=True)
class Fit:
    """Adapters of one rank on all seven modules."""

    rank: int
    adapter_bytes: int
    adapters: int
    """How many fit beside weights and cache."""


@dataclass(frozen=True)
class Sizes:
    """What a base takes, in bytes, in the type that it would be served in."""

    dtype: str
    free_bytes: int
    weights_bytes: int
    """Without norms and biases."""
    steps_bytes: int
    """What the largest step needs."""
    kv_bytes: int
    kv_token_bytes: int
    fits: tuple[Fit, ...]

    @property
    def kv_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self.kv_bytes // self.kv_token_bytes


def read_base(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` of a base: the file, or the folder that holds it.

    Raises:
        CheckpointInvalid: there is none, or it is no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CheckpointInvalid(f"{file}: expected the config.json of a checkpoint: {why}") from error
    if not isinstance(config, dict):
        raise CheckpointInvalid(f"{file}: expected a JSON object")
    return config


def sizes_of(
    config: dict[str, Any], dtype: str, free_bytes: int, kv_bytes: int | None, steps_bytes: int = 0
) -> Sizes:
    """Return the sizes of a base on a device with free_bytes before anything is loaded.

    Raises:
        CheckpointInvalid: the base is not served.
    """
    model, item = read_fields(config), ITEM_BYTES[dtype]
    dims = model.dims
    features = [dims.features(module) for module in MODULES]
    tables = dims.vocab * dims.hidden * (1 if model.tied_embeddings else 2)
    weights = item * (tables + dims.num_layers * sum(inside * outside for inside, outside in features))
    left = max(free_bytes - weights - steps_bytes, 0)
    cache = int(KV_SHARE * left) if kv_bytes is None else kv_bytes
    per_rank = item * dims.num_layers * sum(inside + outside for inside, outside in features)
    room = max(left - cache, 0)
    return Sizes(
        dtype=dtype,
        free_bytes=free_bytes,
        weights_bytes=weights,
        steps_bytes=steps_bytes,
        kv_bytes=cache,
        kv_token_bytes=2 * dims.num_layers * dims.num_kv_heads * dims.head_dim * item,
        fits=tuple(Fit(rank, rank * per_rank, room // (rank * per_rank)) for rank in RANKS),
    )
