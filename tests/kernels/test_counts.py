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
OF_EXPERTS = {"gpt_oss": 2}
"""More where experts may be touched: one, and a kernel that clamps gate and up adds no update."""


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
    """A graph may hold it; a layer waits for two launches more with adapters, and for one more of experts."""
    fields = HUB_CONFIGS[name]
    whole = (
        fields | {"text_config": shallow(fields["text_config"])} if "text_config" in fields else shallow(fields)
    )
    counted = Counted(config := read_fields(whole))
    base, plain, of_experts = (
        len(in_line(counted.launched(8, mixed=False, adapters=adapters, experts=experts)))
        for adapters, experts in ((False, False), (True, False), (True, True))
    )
    model = fields["model_type"]
    more = next((more for family, more in MORE.items() if model.startswith(family)), 0)
    assert plain - base <= (2 + more) * config.dims.num_layers
    assert of_experts - plain <= OF_EXPERTS.get(model, 1) * config.dims.num_layers
