"""`loramux check --fix` for every shape: the table, the rules about servers, and what PEFT computes of both."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from safetensors.numpy import load_file

from loramux_shared.adapter_files import CONFIG, WEIGHTS
from tests.golden.servers.fixes import FIXES, fix
from tests.golden.servers.probes import TRIED
from tests.golden.test_wild import of_peft
from tests.golden.wild.shape import Shape

ROWS: Final[dict[str, str]] = json.loads(FIXES.read_text())
READ: Final = ("sglang", "tensorrt-llm")
"""Servers that nobody ran; they may refuse modules without others, or ranks of experts, whatever is written."""
WRITTEN: Final = [
    shape
    for shape in TRIED
    if ROWS[shape.name].partition(" | ")[0] != "nothing" and "E_" not in ROWS[shape.name]
]
"""Shapes that are written again."""


@pytest.mark.parametrize("shape", TRIED, ids=lambda shape: shape.name.replace(" ", "-"))
def test_every_shape_is_fixed_or_refused_by_name(tmp_path: Path, shape: Shape) -> None:
    """Every server that was run serves a written folder exactly; a refusal writes nothing."""
    done = fix(shape, tmp_path)
    assert done.row == ROWS[shape.name]
    assert done.out.exists() == bool(done.fixed.changes)
    if done.fixed.changes:
        assert set(done.left) <= set(READ)
        assert fix_again(done.out, tmp_path / "again", shape) == "nothing"


def fix_again(out: Path, folder: Path, shape: Shape) -> str:
    """Return what becomes of a folder that was written."""
    folder.mkdir()
    return fix(written(shape, out), folder).row.partition(" | ")[0]


def written(shape: Shape, out: Path) -> Shape:
    """Return a folder that was written as a shape."""
    config, values = json.loads((out / CONFIG).read_text()), load_file(out / WEIGHTS)
    return replace(shape, config=config, tensors=lambda: values, under=None, files=(), shards=0)


@pytest.mark.sweep
@pytest.mark.parametrize("shape", WRITTEN, ids=lambda shape: shape.name.replace(" ", "-"))
def test_peft_computes_the_same_of_both(tmp_path: Path, shape: Shape) -> None:
    """The part that PEFT adds to each module is equal, but for the rounding of what was multiplied."""
    done = fix(shape, tmp_path)
    config = {"peft_type": "LORA"} | dict(shape.config or {})
    config |= {"r": int(config["r"])} if isinstance(config.get("r"), float) else {}
    before = of_peft(replace(shape, config=config, under=shape.under or {}), tmp_path)
    after = of_peft(written(shape, done.out), tmp_path / "after")
    assert before.keys() == after.keys()
    for name, delta in before.items():
        np.testing.assert_allclose(after[name], delta, rtol=1e-5, atol=1e-6 * abs(delta).max())
