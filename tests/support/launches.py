"""How many launches a recorded step has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

ONCE_PER_LAYER = "rope_write_kernel"


def per_layer(names: Sequence[str]) -> int:
    """Launches from one layer to the next, the same for all."""
    places = [place for place, name in enumerate(names) if name == ONCE_PER_LAYER]
    (distance,) = {later - earlier for earlier, later in pairwise(places)}
    return distance


def per_step(names: Sequence[str], num_layers: int) -> int:
    """Launches that do not belong to a layer: inputs, rotation, embedding, head, sampling."""
    return len(names) - num_layers * per_layer(names)
