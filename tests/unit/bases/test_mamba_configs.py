"""Configs of the families of this extension, and its scan; tests of all families have their answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from inference_service.engine.kernels.delta import DeltaStates, StateChunk
from inference_service.engine.models.mamba_scan import MambaWeights, mamba
from loramux_shared.bases.mamba_layers import MambaLayer
from loramux_shared.bases.read import read_config, read_fields
from loramux_shared.faults import CheckpointInvalid
from tests.models.test_families import CASES
from tests.support.cases import cases
from tests.support.greedy import choices_and_logprobs
from tests.support.tiny import World, make_checkpoint, oracle, run_engine

GRANITE, MAMBA = "granite-4.0-h-tiny", ["mamba"]
HUB: dict[str, dict[str, Any]] = cases(__file__, "HUB")
HUB[GRANITE]["layer_types"] = MAMBA * 5 + (["attention"] + MAMBA * 9) * 3 + ["attention"] + MAMBA * 4
REFUSED = [
    *cases(__file__, "REFUSED"),
    (GRANITE, {"layer_types": MAMBA * 40}, "one at least that attends; found linear_attention"),
    (GRANITE, {"layer_types": ["attention"] + ["conv"] * 39}, "linear_attention.*found conv, full_attention"),
]


@pytest.mark.parametrize("name", HUB)
def test_configs_mean_what_transformers_takes_them_for(tmp_path: Path, name: str) -> None:
    """A config of the hub, and the same config as transformers writes it, are the same model."""
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "full")
    assert read_config(tmp_path) == read_config(tmp_path / "full")


@pytest.mark.parametrize(("name", "change", "expected"), REFUSED)
def test_switches_that_are_not_served_are_refused(name: str, change: dict[str, Any], expected: str) -> None:
    """A switch that would change answers is named."""
    with pytest.raises(CheckpointInvalid, match=expected):
        read_fields(HUB[name] | change)


def test_bounds_of_steps_hold_in_every_row(tmp_path: Path) -> None:
    """The bounds hold in prompts, in chunks of them and in answers, as transformers computes them at once."""
    config = CASES["granite-4"].config
    make_checkpoint(tmp_path / "base", type(config)(**config.to_dict() | {"time_step_limit": [0.9, 1.3]}))
    world = World(tmp_path / "base", {}, tmp_path)
    [found] = run_engine(world.load(world.built(), max_batch_tokens=16), [("base", range(3, 40))], 14)
    assert choices_and_logprobs(oracle(world.base, None), range(3, 40), found)[0] == found


def test_tiles_of_rows_compute_what_rows_do() -> None:
    """Chunks of some tiles, of one row and of a new sequence, in a slot with NaN, are those of their rows."""
    spec = MambaLayer(6, 10, 2, 12, 4, gating="behind norm")
    torch.manual_seed(0)
    shapes = (4, 108), 108, 6, 6, 6, 60, (306, 174), (3, 3, 108), (3, 6, 10, 12)
    conv, bias, decay, dt_bias, skip, norm, rows, window, states = map(torch.randn, shapes)
    weights = MambaWeights(conv, bias, -decay.exp(), dt_bias, skip, norm, 1e-5)
    window[0] = states[0] = torch.nan
    chunks = StateChunk(0, 300, 1, False), StateChunk(300, 1, 2, False), StateChunk(301, 5, 0, True)
    found = []
    for by_row in (False, True):
        own = DeltaStates(window.clone(), states.clone())
        found.append((mamba(rows, spec, weights, own, chunks, by_row=by_row), own.conv, own.recurrent))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
