"""The launches of a step on a GPU, counted without one, against the golden table."""

from typing import Any

import pytest

from benchmarks.counts import Counted, in_line
from loramux_shared.bases.read import read_fields
from tests.golden.kernels.counts import TABLE, text
from tests.support.hub_configs import HUB_CONFIGS

LAYERS = 4
MORE = {"qwen3_5_moe": 2, "qwen3_5": 1, "olmo": 1, "ministral3": 1, "mistral3": 1, "gemma4": 3}
"""Launches a layer beyond two: something else reads queries and keys first, or there are more linears."""


def test_the_counts_are_those_that_are_kept() -> None:
    """Launches, programs, rows and kinds of steps change only where a change is meant to (make golden)."""
    assert text().splitlines() == TABLE.read_text().splitlines()


def shallow(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out all but the first layers, where later ones do not read the keys of earlier ones."""
    if fields.get("num_kv_shared_layers"):
        return fields
    lists = {name: fields[name][:LAYERS] for name in ("layer_types", "no_rope_layers") if fields.get(name)}
    return fields | lists | {"num_hidden_layers": LAYERS}


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_a_decode_of_any_family_is_recorded(name: str) -> None:
    """A graph may hold it, and a layer waits for two launches more than without adapters, of experts too."""
    fields = HUB_CONFIGS[name]
    whole = (
        fields | {"text_config": shallow(fields["text_config"])} if "text_config" in fields else shallow(fields)
    )
    counted = Counted(config := read_fields(whole))
    base, adapted = (
        in_line(counted.launched(8, mixed=False, adapters=adapters, experts=False))
        for adapters in (False, True)
    )
    model = fields["model_type"]
    more = next((more for family, more in MORE.items() if model.startswith(family)), 0)
    assert len(adapted) - len(base) <= (2 + more) * config.dims.num_layers
