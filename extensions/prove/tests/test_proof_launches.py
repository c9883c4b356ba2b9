"""The first proof waits for no compiler."""

from pathlib import Path

import pytest
import torch

from inference_service.core.adapter import Adapter
from inference_service.engine.backends.triton_lora import TritonLora
from loramux_prove.replay import _submit, rehearse
from loramux_shared.bundle.proof import PROBE_LENGTHS
from tests.kernels.test_recorded_steps import BLOCKS, LIMITS
from tests.support.recorded import BLOCK, note_launches, runner_of
from tests.support.tiny import make_world
from tests.support.weights import adapter_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels tell of themselves when interpreted")
def test_the_first_proof_launches_what_the_start_has_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of a rank that no other has is proved in a bank of its own, by kernels of the start."""
    world = make_world(tmp_path)
    ready = world.load(world.built(max_lora_rank=16), backend="triton")
    model, lora = ready.base.model, ready.lora
    with note_launches(monkeypatch) as known:
        runner_of(ready, LIMITS, BLOCKS).capture()
        recorded = set(known)
        rehearse(lora, model, BLOCK)
    of_proofs = TritonLora(model.config.groups, model.config.dims.num_layers, model.dtype, model.device)
    kv = model.config.attentions[1].kv_features
    rows = [(1, "attn_k", torch.ones(7, model.config.dims.hidden), torch.ones(kv, 7))]
    packed = of_proofs.pack(adapter_of(rows, model.config.layer_groups))
    of_proofs.open(packed.num_bytes, 16, 1)
    of_proofs.copy(packed, 0)
    of_proofs.enter(0, 0, packed)
    with note_launches(monkeypatch) as proof:
        _submit([[3] * length for length in PROBE_LENGTHS], Adapter("first", 0), of_proofs, model, BLOCK)
    assert not proof - known
    assert proof - recorded
