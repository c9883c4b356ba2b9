"""The reference of proofs and the engine are two programs that agree about every family of decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inference_service.proof.adapter_source import read_adapter
from inference_service.proof.reference import Reference
from loramux_shared.bases.read import read_config
from tests.kernels import test_uneven_steps
from tests.models.test_families import CASES, Case
from tests.support.tiny import make_world_of, oracle

UNEVEN = {"uneven": Case(test_uneven_steps.CONFIG, test_uneven_steps.ADAPTERS)}


def _is_dense(case: Case) -> bool:
    text = case.config.get_text_config()
    return not (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None))


DENSE = {name: case for name, case in (CASES | UNEVEN).items() if _is_dense(case)}
"""Of mixtures there are no proofs."""


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_the_reference_is_transformers_and_peft(case, tmp_path: Path) -> None:
    """Logits behind a probe longer than any window are those of transformers with PEFT, fused or not."""
    world = make_world_of(tmp_path, case.config, {"all": case.adapters["all"]}, case.max_seq_len)
    config = read_config(world.base, case.max_seq_len)
    tokens = [5 + (index * 37) % 180 for index in range(60)]
    adapter = read_adapter(world.adapters["all"], config)
    [run] = Reference(config, world.base).run({"all": [tokens]}, {"all": adapter})["all"]
    with torch.no_grad():
        expected = oracle(world.base, world.adapters["all"])(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(run.logits, expected, rtol=1e-3, atol=1e-3)
